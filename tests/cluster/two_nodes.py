"""A Ray cluster of two machines on this one, until standard input is closed."""

import os
import sys

from hip_cluster.ray_cluster import PATIENCE

# read by Ray when it is imported
os.environ |= PATIENCE

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    second = cluster.add_node(**NODE)
    print("address", cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(second, allow_graceful=False)
        elif line.strip() == "add":
            second = cluster.add_node(**NODE)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
