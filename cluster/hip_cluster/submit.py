"""``hip-cluster submit``: an endpoint as a job of a Ray cluster.

What ``ray job submit -- python -m hip_cluster.serve endpoint.yaml`` does, and twice the same
document is one job: its id is made of what the document says.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hip_cluster.spec import EndpointSpec

ENTRYPOINT = "python -m hip_cluster.serve endpoint.yaml"
ID_DIGITS = 12
AGENT_SECONDS = 60.0


def submission_id(spec: EndpointSpec) -> str:
    """The same for the same document, however it is laid out."""
    digest = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    return f"{spec.name}-{digest[:ID_DIGITS]}"


def submit_endpoint(spec: EndpointSpec, file: Path, address: str, wait: bool) -> int:
    """Submit it, unless it runs already; follow its log where ``wait``. The job's exit code.

    Raises ValueError, in one line, where the job server does not take it.
    """
    from ray.job_submission import JobStatus

    client = _connect(address)
    name = submission_id(spec)
    runs = [job for job in client.list_jobs() if _is_run_of(job.submission_id, name)]
    active = [job for job in runs if not job.status.is_terminal()]
    if active:
        job = active[0].submission_id
        print(f"{job} runs already")
    else:
        job = name if not runs else f"{name}-{len(runs) + 1}"
        with tempfile.TemporaryDirectory() as folder:
            # nothing else of this machine is uploaded
            shutil.copy(file, Path(folder) / "endpoint.yaml")
            _submit(client, job, folder)
        print(f"submitted {job}; end it with: ray job stop {job}")
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"{job} goes on; end it with: ray job stop {job}")
        return 0
    return 0 if client.get_job_status(job) == JobStatus.SUCCEEDED else 1


def _submit(client: Any, job: str, folder: str) -> None:
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=ENTRYPOINT, submission_id=job, runtime_env={"working_dir": folder}
            )
            return
        except RuntimeError as error:
            # a cluster that was just started takes jobs a moment later
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                said = str(error).strip().splitlines()[-1][:200]
                raise ValueError(f"Ray did not take {job}: {said}") from None
            time.sleep(1)


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except Exception as error:
        # of many kinds, some with pages of advice
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        advice = "see that the address is its job server's"
        if "401" in str(error) or "uthenticat" in str(error) or "token" in str(error).lower():
            advice = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        raise ValueError(f"Ray's job server at {address} refused: {said[:200]}; {advice}") from None
    return client


def _is_run_of(job: str | None, name: str) -> bool:
    return job is not None and (job == name or job.rsplit("-", 1)[0] == name)


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
