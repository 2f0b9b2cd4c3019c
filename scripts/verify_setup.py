"""Says in one line why the environment that `make setup` just made would not work, if so."""

import sys
from importlib.metadata import distributions, version


def complaint(kind: str, sglang: str, torch: str) -> str | None:
    if version("sglang") != sglang:
        return f"sglang {version('sglang')} is installed, not {sglang}"
    built = version("torch")
    if built.split("+")[0] != torch:
        return f"torch {built} is installed, not {torch}"
    if kind == "gpu" and built.endswith("+cpu"):
        return (
            "there is an NVIDIA GPU, but pip's configuration chose a CPU build of torch; mend that"
        )
    cuda = sorted({d.name for d in distributions() if d.name.startswith("nvidia-")})
    if built.endswith("+cpu") and cuda:
        return f"torch is a CPU build, yet CUDA packages were installed: {', '.join(cuda)}"
    return None


if __name__ == "__main__":
    problem = complaint(*sys.argv[1:4])
    if problem:
        sys.exit(problem)
