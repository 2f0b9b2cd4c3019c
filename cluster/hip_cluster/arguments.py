"""SGLang's command line, made of an endpoint's document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hip_cluster.spec import EndpointSpec

BACKEND = "hip_attention"
# what the document says in words of its own, or what would go round the supervisor
OWNED = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--served-model-name": "model.served_name",
    "--context-length": "model.context_length",
    "--dtype": "model.dtype",
    "--tp": "parallel.tp",
    "--tp-size": "parallel.tp",
    "--tensor-parallel-size": "parallel.tp",
    "--pp-size": "parallel.pp",
    "--pipeline-parallel-size": "parallel.pp",
    "--nnodes": "parallel.nodes",
    "--device": "parallel.device",
    "--host": "server.host",
    "--port": "server.port",
    "--hip-config": "hip.config",
    "--hip-preset": "hip.preset",
    "--api-key": "auth.api_key_file or auth.api_key_env",
}
# without a counterpart
REFUSED = {
    "--use-ray": "it is always on",
    "--node-rank": "Ray places the ranks",
    "--dist-init-addr": "Ray places the ranks",
    "--dp": "use replicas",
    "--dp-size": "use replicas",
    "--data-parallel-size": "use replicas",
    "--config": "name its settings here",
    "--admin-api-key": "a key must not stand on a command line",
}


def check_arguments(arguments: Sequence[str]) -> str | None:
    """Why these cannot stand in ``server.arguments``; None where they can."""
    for argument in arguments:
        name = argument.split("=", 1)[0]
        if name in OWNED:
            return f"{name} is this document's {OWNED[name]}; say it there"
        if name in REFUSED:
            return f"{name} cannot be given: {REFUSED[name]}; take it out"
    return None


def server_arguments(spec: EndpointSpec, host: str, port: int) -> list[str]:
    """The arguments of ``sglang.launch_server`` for one replica that listens at host:port."""
    parallel = spec.parallel
    arguments = [
        *("--model-path", spec.model.path),
        *("--dtype", spec.model.dtype),
        *("--tp-size", str(parallel.tp)),
        *("--pp-size", str(parallel.pp)),
        *("--nnodes", str(parallel.nodes)),
        *("--device", parallel.device),
        *("--host", host),
        *("--port", str(port)),
        *("--hip-config", json.dumps(spec.hip_config)),
    ]
    if spec.model.served_name is not None:
        arguments += ["--served-model-name", spec.model.served_name]
    if spec.model.context_length is not None:
        arguments += ["--context-length", str(spec.model.context_length)]
    given = {argument.split("=", 1)[0] for argument in spec.server.arguments}
    if not given & {"--attention-backend", "--decode-attention-backend"}:
        arguments += ["--attention-backend", BACKEND]
    return [*arguments, *spec.server.arguments]
