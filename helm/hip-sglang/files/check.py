"""What `helm test` asks of an endpoint: health, one quote, and a refusal without the key."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

# sentences that no document repeats, and a quote that only its document can continue
DOCUMENT = "\n".join(
    f"Shelf {number} of the archive holds the letters of {name}, bound in {colour} cloth."
    for number, (name, colour) in enumerate(
        [
            ("Ada Orlov", "grey"),
            ("Bruno Castell", "crimson"),
            ("Chidi Mbeki", "green"),
            ("Dagny Holm", "yellow"),
            ("Esra Demir", "black"),
            ("Farid Aziz", "violet"),
        ],
        start=11,
    )
)
QUOTE = "of the archive holds the letters of Dagny Holm, bound in"


def main(check: str) -> int:
    url, model = os.environ["HIP_URL"], os.environ["HIP_MODEL"]
    file = os.environ.get("HIP_SGLANG_API_KEY_FILE")
    key = Path(file).read_text(encoding="utf-8").strip() if file else ""
    if check == "health":
        status, _ = ask(f"{url}/health")
        return report(status == 200, f"/health answers {status}")
    body = {
        "model": model,
        "prompt": f"{DOCUMENT}\n\n{QUOTE}",
        "max_tokens": 8,
        "temperature": 0,
    }
    if check == "refusal":
        status, _ = ask(f"{url}/v1/completions", body)
        return report(status == 401, f"a request without the key gets {status}")
    status, answer = ask(f"{url}/v1/completions", body, key)
    text = answer["choices"][0]["text"] if status == 200 else json.dumps(answer)
    # a model that was trained may go on in its own words; the built-in one quotes
    good = text.lstrip().startswith("yellow") if os.environ["HIP_EXACT"] == "true" else text != ""
    return report(status == 200 and good, f"the quote goes on ({status}): {text!r}")


def ask(url: str, body: dict[str, Any] | None = None, key: str = "") -> tuple[int, Any]:
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=float(os.environ["HIP_TIMEOUT"])) as answer:
            text = answer.read()
            return answer.status, json.loads(text) if body is not None else None
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def report(good: bool, what: str) -> int:
    print(f"{'ok' if good else 'FAILED'}: {what}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
