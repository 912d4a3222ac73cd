"""The configuration file is edited while the gateway runs: what changed changes, and nothing else does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for

Make = Callable[..., Gateway]


class Editor:
    """The file of a gateway, in the hands of somebody who edits it."""

    def __init__(self, one: Gateway) -> None:
        self.one = one
        self.config: dict[str, Any] = yaml.safe_load(one.config_path.read_text())
        self.models: dict[str, Any] = self.config["models"]

    def put(self, name: str, model: dict[str, Any]) -> None:
        """Gives the file one more model, which the test finds again by its environment."""
        mark = next(iter(self.models.values()))["env"]
        self.models[name] = model | {"env": mark | model.get("env", {})}

    def save(self) -> None:
        """As editors do: another file is put in its place."""
        fresh = self.one.config_path.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self.config))
        fresh.replace(self.one.config_path)

    def saved(self) -> None:
        """Saves it and waits until it is in effect."""
        before = self.generation()
        self.save()
        wait_for(lambda: self.generation() > before, "the change is in effect")

    def generation(self) -> int:
        """The catalogue's count."""
        generation: int = self.lifecycle()["catalog_generation"]
        return generation

    def lifecycle(self) -> dict[str, Any]:
        """What lifecycle says of its configuration."""
        said: dict[str, Any] = self.one.status()["lifecycle"]
        return said if said["reachable"] else self.lifecycle()

    def ready(self, model: str) -> dict[str, int]:
        """The process of each server of a model that is ready, by instance."""
        return {
            one["instance_id"]: one["pid"]
            for one in self.one.instances()
            if one["model"] == model and one["state"] == "ready"
        }

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the command shows."""
        command: list[str | Path] = [BIN / "tidegate", "events", "--json", "--config", self.one.config_path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        return [event for event in events if event["kind"] == kind]


def test_models_come_and_change_and_others_go_on(gateway: Make) -> None:
    """A new model is usable at once, new limits hold without a restart, a new command restarts one model."""
    one = gateway({"a": simulated(vram="4GiB"), "b": simulated(vram="4GiB")}).start()
    assert [one.chat(name).status_code for name in "ab"] == [200, 200]
    editor = Editor(one)
    before = {name: editor.ready(name) for name in "ab"}
    editor.put("c", simulated(vram="4GiB"))
    editor.models["a"] |= {"max_concurrent": 3, "aliases": ["other-a"], "request_defaults": {"max_tokens": 7}}
    editor.models["b"]["command"].append("--access-log")
    editor.saved()
    assert wait_for(lambda: one.chat("c").status_code == 200, "the new model answers")
    answer = wait_for(lambda: (got := one.chat("other-a")).status_code == 200 and got, "the alias answers")
    assert answer.headers["x-max-concurrent"] == "3"
    assert wait_for(lambda: one.chat("b").status_code == 200, "the changed one answers")
    assert editor.ready("a") == before["a"], "its server goes on"
    assert editor.ready("b").keys().isdisjoint(before["b"]), "its server is another one"
    (event,) = editor.events("config_reloaded")
    assert event["message"] == "added: c; restarted when they run: b; adjusted: a"
    (reason,) = {item["message"] for item in editor.events("draining")}
    assert reason == "its model's configuration has changed"


def test_a_model_that_is_taken_out_ends_in_good_order(gateway: Make) -> None:
    """What runs on it runs to its end, who waits for it is told, and later callers find no such model."""
    slow = simulated("--token-rate", "10", vram="4GiB", max_concurrent=1)
    one = gateway({"gone": slow, "stays": simulated(vram="4GiB")}).start()
    assert one.chat("stays").status_code == 200
    editor = Editor(one)
    with ThreadPoolExecutor() as pool:
        runs = pool.submit(one.chat, "gone", max_tokens=60)
        wait_for(lambda: one.queue("gone")["active"] == 1, "it is served")
        waits = pool.submit(one.chat, "gone")
        wait_for(lambda: one.queue("gone")["waiting"] == 1, "the other one waits")
        del editor.models["gone"]
        editor.saved()
        refused = waits.result(20)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "taken out of the configuration" in refused.json()["error"]["message"]
        assert not runs.done(), "it ends later, by itself"
        assert runs.result(20).status_code == 200
        assert runs.result().json()["usage"]["completion_tokens"] == 60
    wait_for(lambda: len(one.servers()) == 1, "its server is gone")
    assert one.chat("gone").status_code == 404
    assert one.chat("stays").status_code == 200
    editor.put("gone", simulated(vram="4GiB"))
    editor.saved()
    assert wait_for(lambda: one.chat("gone").status_code == 200, "it is back")


def test_a_bad_file_is_refused_and_the_old_one_stays(gateway: Make) -> None:
    """Every problem is told where people look (status, events, list, metrics) until the file is right."""
    metrics = free_port()
    one = gateway({"a": simulated()}, lifecycle={"metrics_listen": f"127.0.0.1:{metrics}"}).start()
    assert one.chat("a").status_code == 200
    editor = Editor(one)
    before = editor.ready("a"), editor.generation()

    def refused() -> float:
        page = httpx.get(f"http://127.0.0.1:{metrics}/metrics", trust_env=False).text
        return float(re.findall(r"^tidegate_config_refused (\S+)", page, re.MULTILINE)[0])

    assert refused() == 0
    right = one.config_path.read_text()
    editor.models["a"]["vram"] = "much"
    editor.models["b"] = {"engine": "command"}
    for wrong in (yaml.safe_dump(editor.config), "", "models: ["):
        one.config_path.write_text(wrong)
        assert wait_for(lambda: editor.lifecycle()["config_problems"], "the problems are told")
        assert one.chat("a").status_code == 200
        assert (editor.ready("a"), editor.generation()) == before
        assert refused() == 1
        if "much" in wrong:
            problems = "\n".join(editor.lifecycle()["config_problems"])
            assert "models.a.vram" in problems
            assert "models.b.command" in problems
            (event,) = editor.events("config_refused")
            assert "models.a.vram" in event["message"]
            command: list[str | Path] = [BIN / "tidegate", "models", "list", "--config", one.config_path]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert "the configuration file is refused" in done.stdout
        one.config_path.write_text(right)
        assert wait_for(lambda: not editor.lifecycle()["config_problems"], "it is right again")
    one.config_path.rename(one.config_path.with_suffix(".away"))
    assert wait_for(lambda: "can't be read" in str(editor.lifecycle()["config_problems"]), "it is missing")
    one.config_path.with_suffix(".away").rename(one.config_path)
    assert wait_for(lambda: not editor.lifecycle()["config_problems"], "it is there again")
    assert (editor.ready("a"), editor.generation(), refused()) == (*before, 0)


def test_what_needs_a_restart_is_named_and_the_rest_applies(gateway: Make) -> None:
    """Another port and another card wait for a restart; times and a new model don't."""
    one = gateway({"a": simulated(vram="4GiB")}).start()
    assert one.chat("a").status_code == 200
    editor = Editor(one)
    editor.config["lifecycle"] |= {
        "metrics_listen": f"127.0.0.1:{free_port()}",
        "idle_timeout": "200ms",
        "devices": [{"id": "gpu1", "memory": "24GiB", "budget": 1.0}],
    }
    editor.put("b", simulated(vram="4GiB", idle_timeout="1h"))
    editor.saved()
    assert editor.lifecycle()["config_needs_restart"] == ["lifecycle.devices", "lifecycle.metrics_listen"]
    assert wait_for(lambda: one.chat("b").status_code == 200, "the new model answers, on the old card")
    assert wait_for(lambda: not editor.ready("a"), "the new idle time holds for the old model")
    assert editor.ready("b")


def test_a_hangup_has_the_file_read_at_once(gateway: Make) -> None:
    """SIGHUP to `serve` reaches lifecycle, which says what it found; nobody ends by it."""
    one = gateway({"a": simulated()}).start()
    editor = Editor(one)
    assert one.process is not None

    def told() -> list[dict[str, Any]]:
        assert one.process is not None
        one.process.send_signal(signal.SIGHUP)
        return editor.events("config_reloaded")

    event = wait_for(told, "it was read again", 60)[0]
    assert event["message"] == "nothing changed"
    assert one.chat("a").status_code == 200
    assert "ended" not in one.log(), "no service took the signal for its end"
    assert "SIGHUP has no function here" in one.log()


def test_traffic_goes_on_while_the_file_is_edited(gateway: Make) -> None:
    """Twenty edits of one model under load: no request fails, of the changed one or of the one beside it."""
    one = gateway({"edited": simulated(vram="4GiB"), "beside": simulated(vram="4GiB")}).start()
    editor = Editor(one)
    ended, failures = threading.Event(), list[str]()
    served = dict.fromkeys(("edited", "beside"), 0)

    def ask(model: str) -> None:
        with httpx.Client(base_url=one.url, timeout=60, trust_env=False) as client:
            body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            while not ended.is_set():
                answer = client.post("/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    failures.append(f"{model}: {answer.status_code} {answer.text}")
                served[model] += 1

    threads = [threading.Thread(target=ask, args=(model,)) for model in (*served, *served)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: all(served.values()), "both are served")
        (beside,) = editor.ready("beside").items()
        for edit in range(20):
            editor.models["edited"]["command"] = simulated("--default-tokens", str(edit + 1))["command"]
            editor.saved()
        assert editor.lifecycle()["catalog_generation"] == 21
        last = served["edited"]
        wait_for(lambda: served["edited"] > last + 2, "the last form of it serves")
    finally:
        ended.set()
        for thread in threads:
            thread.join(30)
    assert not failures, failures[:3]
    assert dict([beside]) == editor.ready("beside"), "its server was never touched"
    (pid,) = editor.ready("edited").values()
    assert "--default-tokens\0" + "20" in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_closed_terminal_ends_what_was_started_in_it(gateway: Make) -> None:
    """The same signal comes when a terminal is closed: then nothing may be left behind."""
    one = gateway({"a": simulated()})
    ours, theirs = os.openpty()
    with one.log_path.open("ab") as log:
        process = subprocess.Popen(
            ["setsid", "--ctty", BIN / "tidegate", "serve", "--config", one.config_path],
            stdin=theirs,
            stdout=log,
            stderr=log,
            env=one.environ,
        )
    os.close(theirs)
    one.process = process
    try:
        wait_for(one.is_ready, "it is ready", 60)
        assert one.chat("a").status_code == 200
    finally:
        os.close(ours)
    assert process.wait(20) == 0
    assert wait_for(lambda: not one.processes(), "all of it has ended")
