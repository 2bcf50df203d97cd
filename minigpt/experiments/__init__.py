"""Experiments that a learner can repeat: each runs, stores, draws, and says what came out.

`catalogue` lists them and `Run` in `runs` says what one run is; `training`, `variants` and `step_cost` carry it out,
`store` keeps what came out; `words`, `paragraphs`, `pictures` and `log` tell it; `command` is the loop over them.
"""
