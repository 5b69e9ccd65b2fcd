"""What responses are written to, and how they are scored.

protocol    what every task is to the stages
toy         the toy tasks of `families`
prompts     tasks of a checkpoint: prompts from files, or written here, and their judges
problems    prompts written here: word problems and titles of stories
rules       judges that are rules: numbers, beginnings of sentences, variety, repeats
judging     from the config to judges
"""
