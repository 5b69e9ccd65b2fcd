"""Where scores come from: verifiable answers, reward models, language models as judges, length, diversity."""
