"""The configuration: every key's range, and every problem at once with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.model_settings import ModelSettings
from tidegate_lifecycle.settings import LifecycleSettings, load, problems

GOOD = {"engine": "command", "command": ["server", "--port", "{port}"], "vram": "10GiB"}
_2MIB = 2 * 2**20


def said(tmp_path: Path, document: Any, warnings: bool = False) -> list[str]:
    path = tmp_path / "tidegate.yaml"
    path.write_text(yaml.safe_dump(document))
    return [str(problem) for problem in problems(path) if warnings or not problem.warning]


def model(tmp_path: Path, **keys: Any) -> list[str]:
    entry = {key: value for key, value in {**GOOD, **keys}.items() if value is not ...}
    return said(tmp_path, {"models": {"m": entry}})


# key: (allowed, refused); at, below and above the ends of each range, and of the wrong type
LIFECYCLE: dict[str, tuple[list[Any], list[Any]]] = {
    "listen": (["127.0.0.1:0", "unix:/run/x.sock"], ["7072", 7072, "h:65536", "", None]),
    "data_dir": (["x", "/abs"], ["", 1, None]),
    "idle_timeout": (["100ms", "365d", 0, "0s"], ["99ms", "366d", 5, -1, "x", True, None]),
    "min_residency": (["0s", "1d"], ["25h", 5, "-1s", None]),
    "max_swap_wait": (["0s", "1d"], ["25h", 5, True]),
    "drain_timeout": (["100ms", "1d", 0], ["50ms", "25h", "5", []]),
    "on_stop": (["stop", "leave"], ["kill", 1, None]),
    "runtime": (["process", "docker"], ["k8s", 1, None]),
    "hf_cache": (["~/.cache/huggingface", "/other", ""], [1, "a\nb", None]),
    "footprints": (
        [
            {},
            {"measure": False},
            {"settle": "0s"},
            {"settle": "10m"},
            {"samples": 3},
            {"samples": 100},
            {"spacing": "50ms"},
            {"spacing": "5m"},
            {"min_confidence": 0},
            {"min_confidence": 1},
        ],
        [
            {"what": 1},
            5,
            {"measure": "no"},
            {"settle": "11m"},
            {"settle": 1},
            {"samples": 2},
            {"samples": 101},
            {"samples": "5"},
            {"spacing": "49ms"},
            {"spacing": "6m"},
            {"min_confidence": -0.1},
            {"min_confidence": 1.1},
            {"min_confidence": "90%"},
        ],
    ),
    "docker": (
        [
            {},
            {"image": "x"},
            {"image": "reg.example:5000/a/b@sha256:0f"},
            {"network": "my_net.1"},
            {"shm_size": "1MiB"},
            {"shm_size": "10TiB"},
            {"memory": None},
            {"memory": "6MiB"},
            {"memory": "10TiB"},
            {"cpus": None},
            {"cpus": 0.1},
            {"cpus": 4096},
            {"pids": 1},
            {"pids": 4194304},
            {"pull": "missing"},
            {"pull": "always"},
            {"pull": "never"},
        ],
        [
            {"what": 1},
            5,
            [],
            {"image": ""},
            {"image": "-x"},
            {"image": "a b"},
            {"image": 1},
            {"network": ""},
            {"network": "a b"},
            {"network": "-n"},
            {"shm_size": "1023KiB"},
            {"shm_size": "11TiB"},
            {"shm_size": 8},
            {"memory": "5MiB"},
            {"memory": "11TiB"},
            {"cpus": 0.09},
            {"cpus": 4097},
            {"cpus": "x"},
            {"pids": 0},
            {"pids": 4194305},
            {"pids": 1.5},
            {"pull": "sometimes"},
            {"pull": None},
        ],
    ),
    "metrics_listen": ([None, "", "127.0.0.1:9"], ["unix:/x", "9", 9]),
    "devices": (
        [
            None,
            [{"id": 0}],
            [{"id": "gpu0", "memory": "1MiB", "budget": 0.01}],
            [{"id": "g", "memory": "10TiB", "budget": 1}],
        ],
        [
            [],
            {},
            [{}],
            [{"id": ""}],
            [{"id": "g", "memory": "1KiB"}],
            [{"id": "g", "memory": "11TiB"}],
            [{"id": "g", "budget": 0.0}],
            [{"id": "g", "budget": 1.01}],
            [{"id": "g", "pool": ""}],
            [{"id": "g", "what": 1}],
            [{"id": "g"}, {"id": "g"}],
        ],
    ),
}
MODEL: dict[str, tuple[list[Any], list[Any]]] = {
    "engine": (["command"], ["vlm", 1, None]),
    "command": (
        [["x", "{port}"], ["x", "{name}{devices}{port}", '{"json": 1}']],
        [..., [], ["x"], "x {port}", ["x", "{prot}", "{port}"], [1, "{port}"], ["", "{port}"]],
    ),
    "aliases": ([[], ["a/b:c"]], [["m"], ["x", "x"], "x", [""], ["a b"], [1]]),
    "upstream_model": ([None, "Other Name"], [1, "a\nb"]),
    "env": ([{}, {"A_1": "x"}], [{"1A": "x"}, {"A": 1}, ["A=1"], {"A": None}]),
    "vram": (["1MiB", "10TiB", "1%", "100%", "90 %"], ["1KiB", "11TiB", "0%", "0.9%", "101%", 10, 0.9, "10"]),
    "pool": (["default"], ["other", "", 1]),
    "health_path": (["/", "/v1/health"], ["health", "", 1, "/a b"]),
    "start_timeout": (["1s", "1d"], ["999ms", "25h", 0, 60]),
    "max_concurrent": ([None, 1, 1000], [0, 1001, -1, 1.5, "1", True]),
    "max_queue": ([None, 1, 10000], [0, 10001, "x", True]),
    "idle_timeout": ([None, 0, "100ms", "365d"], ["99ms", "366d", 60, False]),
    "always_on": ([True, False], ["yes", 1, None]),
    "instances": ([1, 64], [0, 65, "1", None]),
    "request_defaults": ([{}, {"temperature": 0}], [{"model": "x"}, [], {"x": float("nan")}]),
    "max_model_len": ([None, 1, 100_000_000], [0, 100_000_001, "8k"]),
    "max_num_seqs": ([None, 1, 65536], [0, 65537]),
    "kv_reservation_seqs": ([None, 1, 65536], [0, 65537, "x"]),
    "kv_cache_dtype": ([None, "fp8"], ["a b", 8]),
    "tensor_parallel_size": ([None, 1, 64], [0, 65, True]),
    "quantization": ([None, "fp8"], ["a b", 1]),
    "dtype": (["auto"], ["", None, 1]),
    "tokenizer": ([None, "org/name"], ["--flag", 1]),
    "source": ([None, "Qwen/Qwen3-8B"], ["-x", 1]),
    "executable": ([None, "/opt/vllm"], [1]),
    "image": ([None, "x", "a/b:1"], ["a b", "-x", 1]),
    "volumes": (
        [[], ["a:/b"], ["./w:/w:ro", "~/x:/y:rw"]],
        [["a:b"], "a:/b", ["a"], [":/b"], ["a:/b:x"], [1]],
    ),
    "extra_args": ([[]], ["--x", [1], None]),
    "urls": ([[], ["http://h:1", "https://h/v"]], [["ftp://h"], ["http://u@h"], "http://h", ["http://h/?x"]]),
}


def test_every_key_is_listed() -> None:
    """No key was added without its range being tested here."""
    assert set(LIFECYCLE) == set(LifecycleSettings.model_fields)
    assert set(MODEL) == set(ModelSettings.model_fields)


@pytest.mark.parametrize("key", LIFECYCLE)
def test_lifecycle_ranges(key: str, tmp_path: Path) -> None:
    """At both ends of its range a value is taken, beyond them refused with the path of the key."""
    allowed, refused = LIFECYCLE[key]
    for value in allowed:
        assert said(tmp_path, {"lifecycle": {key: value}}) == []
    for value in refused:
        told = said(tmp_path, {"lifecycle": {key: value}})
        assert told, f"{key}: {value!r} was taken"
        assert all(line.startswith(f"lifecycle.{key}") for line in told), told


@pytest.mark.parametrize("key", MODEL)
def test_model_ranges(key: str, tmp_path: Path) -> None:
    """The same for each key of a model, and of `defaults`."""
    allowed, refused = MODEL[key]
    for value in allowed:
        assert model(tmp_path, **{key: value}) == []
    for value in refused:
        told = model(tmp_path, **{key: value})
        assert told, f"{key}: {value!r} was taken"
        assert all(line.startswith(f"models.m.{key}") for line in told), told


def test_all_problems_at_once(tmp_path: Path) -> None:
    """Every problem is said, each with its path; a typo with the nearest key."""
    told = said(
        tmp_path,
        {
            "lifecycle": {"idle_timout": "5m", "drain_timeout": 7},
            "defaults": {"max_queue": 0},
            "models": {"-x": {}, "m": {**GOOD, "vram": "lots"}, "n": 5, "o": {"engine": "vllm"}},
        },
    )
    assert [line.split(": ")[0] for line in told] == [
        "defaults.max_queue",
        "lifecycle.drain_timeout",
        "lifecycle.idle_timout",
        "models.-x",
        "models.m.vram",
        "models.n",
    ]
    assert "did you mean idle_timeout?" in told[2]
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "tidegate.yaml")
    assert len(error.value.problems) == len(told)


@pytest.mark.parametrize(
    ("engine", "key"),
    [("command", "command"), ("vllm", "source"), ("llamacpp", "source"), ("external", "urls")],
)
def test_engines_need_their_keys(engine: str, key: str, tmp_path: Path) -> None:
    """Each engine says which key it can't do without."""
    told = said(tmp_path, {"models": {"m": {"engine": engine}}})
    assert told == [f"models.m.{key}: is required by the engine {engine}"]


@pytest.mark.parametrize(
    "flag", ["--port", "--port=1", "--tensor-parallel-size", "--gpu_memory_utilization=0.9", "--gpu-memory-u"]
)
def test_owned_flags(flag: str, tmp_path: Path) -> None:
    """A flag that the service sets itself is no extra argument."""
    entry = {"engine": "vllm", "source": "a/b", "vram": "1GiB"}
    told = said(tmp_path, {"models": {"m": {**entry, "extra_args": [flag]}}})
    key = "it decides" if "port" in flag else "use the key tensor" if "tensor" in flag else "use the key vram"
    assert len(told) == 1
    assert told[0].startswith(f"models.m.extra_args: {flag!r} is set by the service; {key}")
    assert said(tmp_path, {"models": {"m": {**entry, "extra_args": ["--enforce-eager"]}}}) == []


def test_names_clash(tmp_path: Path) -> None:
    """An alias can't be another model's name or alias."""
    models = {"a": {**GOOD, "aliases": ["b", "x"]}, "b": {**GOOD, "aliases": ["x"]}}
    told = said(tmp_path, {"models": models})
    assert told == [
        "models.a.aliases.0: 'b' is also a name of b",
        "models.b.aliases.0: 'x' is also a name of a",
    ]


def test_warnings(tmp_path: Path) -> None:
    """Odd but legal values are said and refuse nothing."""
    told = said(tmp_path, {"models": {"m": {**GOOD, "max_concurrent": 9, "max_queue": 8}}}, warnings=True)
    assert told == ["warning: models.m.max_concurrent: 9 is more than max_queue (8)"]
    assert load(tmp_path / "tidegate.yaml").catalog.models["m"].max_concurrent == 9


def test_whose_memory_is_not_known_is_warned_of(tmp_path: Path) -> None:
    """A command's can't be estimated; of vllm and llamacpp it can, so nothing is odd about them."""
    vllm = {"engine": "vllm", "source": "a/b"}
    models = {
        "command": {"engine": "command", "command": ["server", "{port}"]},
        "chat": {**vllm, "kv_reservation_seqs": 4, "max_num_seqs": 4},
        "much": {**vllm, "kv_reservation_seqs": 5, "max_num_seqs": 4},
        "gguf": {"engine": "llamacpp", "source": "m.gguf"},
        "none": {"engine": "llamacpp", "source": "m.gguf", "kv_reservation_seqs": 2},
    }
    whole = "is not given: the model gets a whole card of its pool until it was measured"
    assert said(tmp_path, {"models": models}, warnings=True) == [
        f"warning: models.command.vram: {whole}",
        "warning: models.much.kv_reservation_seqs: 5 is more than max_num_seqs (4), which counts",
        "warning: models.none.kv_reservation_seqs: has no function with the engine llamacpp",
    ]
    found = load(tmp_path / "tidegate.yaml").catalog.models["chat"]
    assert (found.kv_reservation_seqs, found.kv_cache_dtype) == (4, "")


def test_a_gguf_model_of_vllm_wants_a_tokenizer(tmp_path: Path) -> None:
    """Without one vLLM converts the file's own: said, not refused; other sources bring theirs."""
    entry = {"engine": "vllm", "vram": "1GiB"}
    models = {
        "a": {**entry, "source": "org/m-GGUF:Q4_K_M"},
        "b": {**entry, "source": "org/m/x.gguf", "tokenizer": "org/m"},
        "c": {**entry, "source": "org/m"},
    }
    told = said(tmp_path, {"models": models}, warnings=True)
    words = "is not given: vLLM then converts the GGUF file's own, which takes long and may be wrong"
    assert told == [f"warning: models.a.tokenizer: {words}"]


def test_containers_have_an_image_and_their_volumes(tmp_path: Path) -> None:
    """With the docker runtime a model's image is its own or the general one; processes have neither."""
    models = {
        "a": {**GOOD, "image": "mine:1", "volumes": ["./w:/w"]},
        "b": {"engine": "vllm", "source": "org/model", "vram": "1GiB"},
        "out": {"engine": "external", "urls": ["http://h:1"], "image": "x"},
    }
    told = said(tmp_path, {"lifecycle": {"runtime": "docker"}, "models": models}, warnings=True)
    words = "has a function with lifecycle.runtime: docker alone, for models that run here"
    assert told == [f"warning: models.out.image: {words}"]
    loaded = load(tmp_path / "tidegate.yaml")
    found = loaded.catalog.models
    assert (found["a"].image, found["a"].volumes) == ("mine:1", ("./w:/w",))
    assert (found["b"].image, found["out"].image) == ("vllm/vllm-openai:latest", "")
    assert loaded.hub_cache == Path("~/.cache/huggingface").expanduser()
    told = said(tmp_path, {"lifecycle": {"hf_cache": ""}, "models": models}, warnings=True)
    assert [line.split(":")[1].strip() for line in told] == [
        "models.a.image",
        "models.a.volumes",
        "models.out.image",
    ]
    loaded = load(tmp_path / "tidegate.yaml")
    assert (loaded.catalog.models["a"].image, loaded.hub_cache) == ("", None)


def test_what_cannot_be_in_a_container_is_said(tmp_path: Path) -> None:
    """A source in somebody's home isn't in the container; an image of vLLM has no llama-server."""
    model = {"engine": "llamacpp", "source": "~/m.gguf", "vram": "1GiB"}
    told = said(tmp_path, {"lifecycle": {"runtime": "docker"}, "models": {"m": model}}, warnings=True)
    words = "is not given: vllm/vllm-openai:latest must hold what the engine llamacpp runs"
    assert told == [
        f"warning: models.m.image: {words}",
        "models.m.source: '~/m.gguf' is no path in a container; mount it with `volumes`, and give that path",
    ]


def test_defaults_are_merged(tmp_path: Path) -> None:
    """A model's own value wins over `defaults`, and that over section lifecycle."""
    document = {
        "lifecycle": {"idle_timeout": "3s", "devices": [{"id": 0, "memory": "2MiB"}]},
        "defaults": {"max_queue": 5, "max_concurrent": 2},
        "models": {"a": {**GOOD, "max_queue": 6}, "b": {**GOOD, "idle_timeout": "4s", "vram": "50%"}},
    }
    assert said(tmp_path, document) == []
    loaded = load(tmp_path / "tidegate.yaml")
    a, b = loaded.catalog.models["a"], loaded.catalog.models["b"]
    assert (a.max_queue, a.max_concurrent, a.idle_timeout, a.vram_mib) == (6, 2, 3.0, 10240)
    assert (b.max_queue, b.idle_timeout, b.vram_share) == (5, 4.0, 0.5)
    assert loaded.devices[0].memory_mib == _2MIB // 2**20
    assert loaded.data_dir == tmp_path / "tidegate-data"
