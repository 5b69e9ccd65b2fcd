"""Constraints on generated text: automata inside the compiled loop, grammars on the host.

`automaton` has the tables and the transform `Constrain`; `regular` (regular expressions,
JSON schemas), `choices` (given texts or token sequences), `stop_strings` and `healing`
build automata; `grammar` drives a host matcher for what no finite automaton accepts.
All of them need to know what bytes the token ids spell: `vocabulary.token_bytes`.
"""
