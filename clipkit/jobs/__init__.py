"""One function over many shards: on this machine, on Ray, or on Spark.

- `run`: `run_jobs`, the one call for all engines; where to begin
- `passes`: a pass over shards that goes on where an earlier run stopped
- `local`, `ray`, `spark`: the engines
- `ranks`: what the processes of one run tell each other
- `worker`: what the engines share around one item
"""
