"""A Ray cluster of two workers on this machine, in a process of its own: it ends with our standard input.

Prints the address, then obeys one word a line: `lose` kills a worker node with all its processes, `add` starts one.
"""

import sys

from ray.cluster_utils import Cluster

# A dead node is noticed after a second, rather than after half a minute.
IMPATIENT = {"health_check_period_ms": 300, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}


def main() -> None:
    # The head has no CPU, so drivers connect to a node that is never lost.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": IMPATIENT, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "lose":
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        else:
            cluster.add_node(num_cpus=1)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
