"""What MetaOptimize has to compute, found by two ways that share nothing with `metaopt`.

`oracle` is a dense float64 transcription of docs/mathematics.md with every derivative written out
by hand. `finite_differences` differentiates whole trajectories by running them again.
`tolerances` says what counts as equal, and why.
"""
