"""Concepts found, named, steered and measured: what stage `steer` is made of.

`naming` says what a concept is, `protocol` what steering it does, `page` how the report
shows both, `open_run` opens a finished run for whoever wants to look further.
"""
