"""Batches, and a real HTTP server that answers them like SGLang's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time

from aiohttp import web

QUESTIONS = 200


class Server:
    """``/generate`` in a thread: keeps what it was asked, and fails where the prompt says so."""

    def __init__(self):
        self.asked, self.now, self.most = [], 0, 0
        self.away = 0  # so many requests find nobody
        self.pause = 0.01
        self.read, self.reading, self.early = set(), set(), 0  # documents; asked too soon
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._started.wait(10)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 30)
        app.add_routes([web.post("/generate", self._generate)])
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()

    async def _generate(self, request):
        if request.headers.get("Authorization") == "Bearer wrong":
            return web.Response(status=401)
        if self.away:
            self.away -= 1
            return web.Response(status=503, headers={"Retry-After": "1"})
        text = (await request.json())["text"]
        self.asked.append(text)
        document = text.split(" question")[0]
        self.early += document in self.reading - self.read
        self.reading.add(document)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.pause)
        self.now -= 1
        self.read.add(document)
        if "impossible" in text:
            return web.json_response({"error": "too long"}, status=400)
        meta = {"prompt_tokens": len(text), "completion_tokens": 1, "cached_tokens": 0}
        return web.json_response({"text": f"<{text[-8:]}>", "meta_info": meta})


def write_questions(path, count=QUESTIONS, documents=20, words=500, **more):
    with path.open("w") as file:
        for number in range(count):
            document = f"document {number % documents} " * words
            line = {"id": f"q{number}", "document": document, "prompt": f"question {number:04d}"}
            line |= more
            file.write(json.dumps(line) + "\n")
    return path


def command(server, questions, output, *more):
    line = [sys.executable, "-m", "hip_cluster.batch", "--url", server.url]
    return [*line, "--input", str(questions), "--output", str(output), *more]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def kill_at_points(chance, server, *arguments, longest):
    """Ten drivers of one batch: each was answered once, and lives on for up to so many seconds."""
    for _ in range(10):
        process = subprocess.Popen(
            command(server, *arguments, "--concurrency", "4"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = len(server.asked)
        while len(server.asked) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.wait()


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]
