"""Sweeps: one recipe at many settings, checked before anything runs, and one table at the end.

    points           a sweep file's generator of overrides -> named points of a config, checked
    combinators      pure pieces that generators are written with
    reuse            stages that several points share are computed once
    runner           points as processes: one after another, or several at a time
    results          what the reports of the points hold: CSV, JSON, Markdown, plots

`nr.sweep` is the command; `launch/` turns the same points into jobs.
"""
