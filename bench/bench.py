#!/usr/bin/env python3
"""What the router costs: CPU, latency, streams held, memory, cold start. Needs Linux and cc.

    python bench/bench.py                                  the router alone, against its targets
    python bench/bench.py --quick                          one short round of everything
    python bench/bench.py --peers portkey,litellm          other gateways beside it, interleaved
    python bench/bench.py --router "python3.12 router.py"  another command for the router
    python bench/bench.py --only small1,stream8            some of the runs (names: --help)

A peer's command comes from the environment (or --peer-command NAME=CMD); the bench appends the
port and the settings:

    BENCH_PORTKEY  e.g. "node FOLDER/node_modules/@portkey-ai/gateway/build/start-server.js"
    BENCH_LITELLM  e.g. "VENV/bin/litellm"

Portkey's own dependencies must be those it was built with, else it cannot stream: install it
with a package.json whose "overrides" pin hono and @hono/node-server (RESULTS.md has the versions).

Everything listens on 127.0.0.1. mock.c is the provider, load.c the client; both are compiled into
a temporary folder. load.c checks every answer: status 200, the whole text, every chunk once and in
order. CPU is user + system time of the gateway's process tree, from /proc, divided by what was
asked; it holds on a busy machine within some 25 %, wall-clock times do not. All requests of a run
are the same, so the router is told (X-Hermes-Cache: refresh) to ask the provider each time; it
names and keeps the answers as it would those of different requests. Only cached1 is answered from
memory. Figures are medians of the rounds, and verdicts judge the medians. Exit code: 0 measured,
1 the router gave a wrong answer (or --gate and it missed a gate), 2 the bench could not run.
"""

from __future__ import annotations

import argparse
import compileall
import http.client
import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEY = "sk-bench"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
START_LIMIT_S = 90.0
TEXT = (
    "A gateway for language models stands between the programs that ask and the services that "
    "answer. It reads a question, chooses who shall answer it, passes it on and brings the answer "
    "back; when a service is tired or away, it asks the next one. All of this has to cost next to "
    "nothing, because a question may be small and the answer may come one word at a time. What it "
    "costs is therefore counted here in microseconds of processor time, not in requests per "
    "second, which say more about the machine than about the program. This paragraph is as long "
    "as a usual short answer, about seven hundred letters, so that the whole reply is near one "
    "kilobyte."
)

VOCABULARY = (
    "please read this file and tell me which function fails when the list is empty or the network "
    "is slow then write a test for it that shows the error before you change any line of code in "
    "module parser because other people depend on its name and its return value"
)


class BenchError(Exception):
    """The bench cannot go on; the message says why."""


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Run:
    """One load: `clients` connections asking for `seconds`; `chunks` 0: whole answers."""

    name: str
    body: str
    clients: int
    seconds: float
    chunks: int = 0
    gap_ms: int = 0
    most: int = 20000
    cached: bool = False  # from the router's memory; the others have none to compare

    @property
    def model(self) -> str:
        """The mock's model whose streams have this shape."""
        return f"mock-c{self.chunks}-g{self.gap_ms}" if self.chunks else "mock"


RUNS = (
    Run("small1", "small", 1, 1.5),
    Run("small16", "small", 16, 1.5),
    Run("agent8", "agent", 8, 1.5),
    Run("huge2", "huge", 2, 2.0, most=400),
    Run("stream8", "small", 8, 1.5, chunks=200),
    Run("first1", "small", 1, 1.5, chunks=10, gap_ms=5),
    Run("cached1", "small", 1, 1.5, cached=True),
)
# Node.js needs some 5,000 requests until its compiler has settled.
WARM_UP = (
    Run("warm", "small", 16, 6.0, most=6000),
    Run("warm-stream", "small", 8, 2.0, chunks=200, most=300),
)
HOLD_CHUNKS, HOLD_GAP_MS = 100, 200


@dataclass(frozen=True)
class Figure:
    """One line of the report. `target` is the aim, `gate` the limit; None: there is none."""

    name: str
    label: str
    target: float | None
    gate: float | None
    digits: int = 0
    more_is_better: bool = False


FIGURES = (
    Figure("small1", "CPU us, small request, 1 client", 350, 450),
    Figure("small16", "CPU us, small request, 16 clients", 350, 450),
    Figure("cached1", "CPU us, small request answered from memory, 1 client", 150, 200),
    Figure("agent8", "CPU us, 60 KB agent request, 8 clients", 1000, None),
    Figure("huge2", "CPU us, 1 MB request, 2 clients", 8000, None),
    Figure("stream8", "CPU us, streamed chunk, 8 streams, no gap", 4, 8, 1),
    Figure("added_ms", "added latency p50, 1 client, ms", 0.6, None, 2),
    Figure("first_ms", "added time to first token p50, 1 client, ms", 1, None, 2),
    Figure("held", "slow streams held at once", None, None, 0, True),
    Figure("hold_p50_ms", "  a new short request meanwhile, p50 ms", 5, 20, 1),
    Figure("hold_max_ms", "  the slowest of them, ms", None, None, 1),
    Figure("hold_first_ms", "  the slowest first token of the streams, ms", None, None, 0),
    Figure("hold_s", "  the slowest stream, s (20 at the provider, 5 with --quick)", None, None, 1),
    Figure("hold_us", "  CPU us per paced chunk", None, None, 0),
    Figure("hold_mb", "  memory while holding, MB", 200, None, 0),
    Figure("idle_mb", "idle memory after the first answer, MB", 60, 60),
    Figure("cold_s", "cold start to the first 200, s", 0.5, 0.7, 2),
    Figure("script_s", "  the same of `python router.py`, which compiles anew, s", None, None, 2),
)


# ---------------------------------------------------------------- requests


def words(rng: random.Random, size: int) -> str:
    """`size` characters like prose, without the marks that mock.c and load.c look for."""
    vocabulary = VOCABULARY.split()
    parts: list[str] = []
    length = 0
    while length < size:
        word = rng.choice(vocabulary) + rng.choice(("", "", "", "", "", ",", ".", "\n"))
        parts.append(word)
        length += len(word) + 1
    return " ".join(parts)[:size]


def agent_tools(rng: random.Random) -> list[object]:
    """25 tools as a coding agent declares them, about 1.1 KB each."""
    names = [f"argument_{i}" for i in range(4)]
    properties = {name: {"type": "string", "description": words(rng, 90)} for name in names}
    schema = {"type": "object", "properties": properties, "required": ["argument_0"]}
    return [
        {
            "type": "function",
            "function": {"name": f"tool_{i}", "description": words(rng, 450), "parameters": schema},
        }
        for i in range(25)
    ]


def chat_body(kind: str, model: str, streamed: bool) -> bytes:
    """The JSON body of a request of this kind: small, agent (60 KB) or huge (1 MB)."""
    rng = random.Random(kind)
    body: dict[str, object] = {"model": model}
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "agent":
        turns = [("user", "assistant")[i % 2] for i in range(19)]
        body["messages"] = [{"role": "system", "content": words(rng, 6000)}] + [
            {"role": role, "content": words(rng, 1350)} for role in turns
        ]
        body["tools"] = agent_tools(rng)
    else:
        size = 1_000_000 if kind == "huge" else 170
        body["messages"] = [{"role": "user", "content": words(rng, size)}]
    return json.dumps(body).encode()


# ---------------------------------------------------------------- processes


def children() -> dict[int, list[int]]:
    """Every process's children, from /proc."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = stat_fields(int(entry)) if entry.isdigit() else []
        if fields:
            found.setdefault(int(fields[1]), []).append(int(entry))
    return found


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name (state first); [] when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    below = children()
    found = [pid]
    for member in found:
        found += below.get(member, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User + system time of the process tree, with that of its children that have ended."""
    ticks = [sum(map(int, fields[11:15])) for fields in map(stat_fields, family(pid)) if fields]
    return sum(ticks) / TICKS


def memory_mb(pid: int) -> float:
    """Resident memory of the process tree."""
    pages = 0
    for member in family(pid):
        fields = stat_fields(member)
        pages += int(fields[21]) if fields else 0
    return pages * PAGE / 1e6


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that we started, and what it started, each by its id."""
    members = family(process.pid)
    for number, wait_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        for member in members:
            try:
                os.kill(member, number)
            except OSError:
                continue
        try:
            process.wait(wait_s)
            break
        except subprocess.TimeoutExpired:
            continue
    if process.stdin:
        process.stdin.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- gateways


@dataclass
class Gateway:
    """A gateway under test. `launch` makes its command, environment and files; None: the mock."""

    name: str
    launch: Callable[[Gateway], tuple[list[str], dict[str, str]]] | None
    folder: Path
    upstream: str
    command: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    whole_model: str = "mock"
    stream_prefix: str = ""
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Starts it; returns the seconds until a chat completion was answered with 200."""
        if self.launch is None:
            return 0.0
        self.port = free_port()
        command, settings = self.launch(self)
        with (self.folder / f"{self.name}.log").open("ab") as log:
            begun = time.monotonic()
            self.process = subprocess.Popen(
                command, cwd=HERE.parent, env=clean_environment(self.folder) | settings,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        while time.monotonic() - begun < START_LIMIT_S:
            if self.process.poll() is not None:
                break
            if self.answers():
                return time.monotonic() - begun
            time.sleep(0.005)
        self.stop()
        log_end = (self.folder / f"{self.name}.log").read_text(errors="replace")[-1500:]
        raise BenchError(f"{self.name} did not answer 200 to a chat completion:\n{log_end}")

    def answers(self) -> bool:
        """Whether a chat completion is answered with 200 now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            body = chat_body("small", self.whole_model, streamed=False)
            connection.request("POST", "/v1/chat/completions", body, self.all_headers())
            answer = connection.getresponse()
            return answer.status == 200 and TEXT.encode() in answer.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def all_headers(self) -> dict[str, str]:
        """The headers of every request to it."""
        own = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return own | self.headers

    def request(self, run: Run) -> bytes:
        """The bytes of a whole HTTP request for this run."""
        model = self.stream_prefix + run.model if run.chunks else self.whole_model
        body = chat_body(run.body, model, streamed=bool(run.chunks))
        lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        headers = self.all_headers()
        if self.name == "router" and not run.cached:
            headers["X-Hermes-Cache"] = "refresh"
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        return "\r\n".join(lines).encode() + body

    def cpu(self) -> float:
        """CPU seconds spent so far."""
        return cpu_seconds(self.process.pid) if self.process else 0.0

    def memory(self) -> float:
        """Resident megabytes now."""
        return memory_mb(self.process.pid) if self.process else 0.0

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self.process:
            end(self.process)
        self.process = None


def clean_environment(folder: Path) -> dict[str, str]:
    """What every gateway gets: no keys or settings of this machine, a home of its own."""
    wanted = ("PATH", "LANG", "LD_LIBRARY_PATH", "PYENV_ROOT", "PYENV_VERSION")
    kept = {name: os.environ[name] for name in wanted if name in os.environ}
    return kept | {"HOME": str(folder), "NO_PROXY": "*"}


def stream_models(runs: list[Run]) -> list[str]:
    """The mock's models that the runs ask for."""
    return list(dict.fromkeys(["mock", *(run.model for run in runs)]))


def launch_router(runs: list[Run]) -> Callable[[Gateway], tuple[list[str], dict[str, str]]]:
    """How the router is started: one provider row points to the mock."""

    def launch(gateway: Gateway) -> tuple[list[str], dict[str, str]]:
        home = gateway.folder / "router-home"
        home.mkdir(exist_ok=True)
        return gateway.command, {
            "HR_HOME": str(home),
            "HOST": "127.0.0.1",
            "PORT": str(gateway.port),
            "PROXY_API_KEYS": KEY,
            "GROQ_BASE_URL": gateway.upstream,
            "GROQ_API_KEY": "k1",
            "GROQ_MODEL": ",".join(stream_models(runs)),
            "GROQ_SKIP_TOKENS_OVER": "0",  # the free tier's ceiling would refuse the large ones
        }

    return launch


def launch_portkey(gateway: Gateway) -> tuple[list[str], dict[str, str]]:
    """Portkey takes the provider's address from request headers."""
    return [*gateway.command, f"--port={gateway.port}", "--headless"], {"NODE_ENV": "production"}


def launch_litellm(runs: list[Run]) -> Callable[[Gateway], tuple[list[str], dict[str, str]]]:
    """LiteLLM reads its models from a file; one worker, a master key, no database."""

    def launch(gateway: Gateway) -> tuple[list[str], dict[str, str]]:
        models = [
            {
                "model_name": model,
                "litellm_params": {
                    "model": f"openai/{model}",
                    "api_base": gateway.upstream,
                    "api_key": "k1",
                },
            }
            for model in stream_models(runs)
        ]
        config = gateway.folder / "litellm.yaml"  # JSON is YAML
        settings = {"model_list": models, "general_settings": {"master_key": KEY}}
        config.write_text(json.dumps(settings))
        command = [*gateway.command, "--config", str(config), "--host", "127.0.0.1"]
        command += ["--port", str(gateway.port), "--num_workers", "1"]
        return command, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    return launch


def peer_command(name: str, given: dict[str, str]) -> list[str]:
    """The command of a peer, from --peer-command or the environment."""
    variable = f"BENCH_{name.upper()}"
    text = given.get(name) or os.environ.get(variable, "")
    if not text:
        raise BenchError(f"no command for peer {name}: set {variable} or --peer-command {name}=CMD")
    return shlex.split(text)


def module_command() -> list[str]:
    """The router as `hr` and the image start it: compiled beforehand."""
    compileall.compile_file(str(HERE.parent / "router.py"), quiet=1)
    return [sys.executable, "-m", "router"]


def build_gateways(args: argparse.Namespace, folder: Path, port: int) -> list[Gateway]:
    """The mock itself ("direct"), the router and the peers, not started yet."""
    upstream = f"http://127.0.0.1:{port}/v1"
    runs = [*RUNS, hold_run(args)]
    gateways = [Gateway("direct", None, folder, upstream, port=port)]
    if not args.no_router:
        command = shlex.split(args.router) if args.router else module_command()
        gateways.append(
            Gateway("router", launch_router(runs), folder, upstream, command,
                    whole_model="hermes-router", stream_prefix="groq/")
        )  # fmt: skip
    given = dict(item.split("=", 1) for item in args.peer_command)
    for name in filter(None, args.peers.split(",")):
        command = peer_command(name, given)
        if name == "portkey":
            headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": upstream}
            gateways.append(Gateway(name, launch_portkey, folder, upstream, command, headers))
        elif name == "litellm":
            gateways.append(Gateway(name, launch_litellm(runs), folder, upstream, command))
        else:
            raise BenchError(f"unknown peer {name}: known are portkey and litellm")
    return gateways


# ---------------------------------------------------------------- tools


def compile_tool(name: str, folder: Path) -> str:
    """Compiles bench/NAME.c; returns the program's path."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchError(
            "no C compiler (cc, gcc or clang) found: the mock provider and the load client are "
            "compiled at each run. Install one, e.g. the package gcc with libc6-dev."
        )
    program = str(folder / name)
    command = [compiler, "-O2", "-o", program, str(HERE / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return program


@contextmanager
def mock_provider(folder: Path) -> Iterator[int]:
    """Runs the mock provider; yields its port. It ends with our end of its standard input."""
    program = compile_tool("mock", folder)
    process = subprocess.Popen(
        [program, str(folder / "text")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise BenchError("the mock provider did not start")
        yield int(line)
    finally:
        end(process)


@dataclass
class Load:
    """The load client: starts runs and reads their results."""

    program: str
    folder: Path

    def begin(self, gateway: Gateway, run: Run, mode: str = "loop") -> subprocess.Popen[bytes]:
        """Starts the run against the gateway."""
        request = self.folder / f"request-{gateway.name}-{run.name}-{mode}"
        request.write_bytes(gateway.request(run))
        arguments = (gateway.port, request, self.folder / "text", run.clients, run.seconds,
                     run.most, run.chunks, mode)  # fmt: skip
        return subprocess.Popen([self.program, *map(str, arguments)], stdout=subprocess.PIPE)

    def result(self, process: subprocess.Popen[bytes], run: Run) -> dict[str, object]:
        """Waits for a run's end; returns what it counted."""
        try:
            out, _ = process.communicate(timeout=run.seconds + 60)
        except subprocess.TimeoutExpired:
            end(process)
            raise BenchError(f"the load client hung in {run.name}") from None
        found = json.loads(out)
        assert isinstance(found, dict)
        return found


# ---------------------------------------------------------------- measuring


@dataclass
class Book:
    """Every value measured, by gateway and figure, and every wrong answer."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    answers: int = 0

    def note(self, gateway: str, figure: str, value: float) -> None:
        """Keeps one value."""
        self.values.setdefault((gateway, figure), []).append(value)

    def median(self, gateway: str, figure: str) -> float | None:
        """The median of what was kept; None: nothing was."""
        found = self.values.get((gateway, figure))
        return statistics.median(found) if found else None

    def best(self, gateway: str, figure: Figure) -> float | None:
        """The best round: nearest to what an undisturbed machine would show."""
        found = self.values.get((gateway, figure.name))
        if not found:
            return None
        return max(found) if figure.more_is_better else min(found)

    def check(self, gateway: str, run: str, result: dict[str, object]) -> bool:
        """Counts the answers; whether all of them were right. Notes the first that was not."""
        self.answers += int(str(result["ok"]))
        if result["bad"]:
            fault = f"{run}: {result['bad']} of {result['requests']} wrong: {result['complaint']}"
            self.faults.append((gateway, fault))
        return not result["bad"] and bool(result["ok"])


def hold_run(args: argparse.Namespace) -> Run:
    """The run in which many slow streams are open at once."""
    chunks = HOLD_CHUNKS // 4 if args.quick else HOLD_CHUNKS
    seconds = chunks * HOLD_GAP_MS / 1000
    return Run("hold", "small", args.streams, seconds, chunks, HOLD_GAP_MS, most=args.streams)


def milliseconds(result: dict[str, object], times: str, which: str) -> float:
    """A time of the load client's report."""
    found = result[times]
    assert isinstance(found, dict)
    return float(found[which]) / 1000


def measure(load: Load, gateway: Gateway, run: Run, book: Book) -> None:
    """One run against one gateway: CPU per request or per chunk, and the client's times."""
    before = gateway.cpu()
    result = load.result(load.begin(gateway, run), run)
    spent_us = (gateway.cpu() - before) * 1e6
    if not book.check(gateway.name, run.name, result):
        return
    count = int(str(result["chunks" if run.chunks else "requests"]))
    if gateway.process:
        book.note(gateway.name, run.name, spent_us / count)
    if run.name == "small1":
        book.note(gateway.name, "latency", milliseconds(result, "latency_us", "p50"))
    if run.name == "first1":
        book.note(gateway.name, "first", milliseconds(result, "first_us", "p50"))


def measure_hold(load: Load, gateway: Gateway, run: Run, book: Book) -> None:
    """Many slow streams at once, and short requests on new connections meanwhile."""
    before = gateway.cpu()
    streams = load.begin(gateway, run, "once")
    time.sleep(1.5)
    probe = Run("probe", "small", 1, run.seconds - 3.0, most=1000)
    short = load.result(load.begin(gateway, probe, "probe"), probe)
    peak_mb = gateway.memory()
    result = load.result(streams, run)
    spent_us = (gateway.cpu() - before) * 1e6
    book.note(gateway.name, "held", float(str(result["peak"])))
    book.check(gateway.name, "hold", result)
    if book.check(gateway.name, "short requests during hold", short):
        book.note(gateway.name, "hold_p50_ms", milliseconds(short, "latency_us", "p50"))
        book.note(gateway.name, "hold_max_ms", milliseconds(short, "latency_us", "max"))
    if gateway.process and result["ok"]:
        book.note(gateway.name, "hold_first_ms", milliseconds(result, "first_us", "max"))
        book.note(gateway.name, "hold_s", milliseconds(result, "latency_us", "max") / 1000)
        book.note(gateway.name, "hold_us", spent_us / int(str(result["chunks"])))
        book.note(gateway.name, "hold_mb", peak_mb)


def measure_start(gateway: Gateway, times: int, book: Book) -> None:
    """Starts the gateway this often; the last one stays. Idle: 1 s after the first answer."""
    for remaining in reversed(range(times)):
        if gateway.command[1:] == ["-m", "router"]:
            script = replace(gateway, command=[sys.executable, "router.py"])
            book.note(gateway.name, "script_s", script.start())
            script.stop()
        book.note(gateway.name, "cold_s", gateway.start())
        time.sleep(1.0)
        book.note(gateway.name, "idle_mb", gateway.memory())
        if remaining:
            gateway.stop()


def add_differences(book: Book, gateways: list[Gateway]) -> None:
    """What a gateway adds to the time that the mock alone takes."""
    for times, figure in (("latency", "added_ms"), ("first", "first_ms")):
        alone = book.median("direct", times)
        for gateway in gateways[1:]:
            through = book.median(gateway.name, times)
            if alone is not None and through is not None:
                book.note(gateway.name, figure, through - alone)


def measure_all(args: argparse.Namespace, load: Load, gateways: list[Gateway], book: Book) -> None:
    """Starts everything, then runs the loads, gateways interleaved."""
    rounds = 1 if args.quick else args.rounds
    for gateway in gateways[1:]:
        say(f"starting {gateway.name}")
        measure_start(gateway, rounds if gateway.name == "router" else 1, book)
    chosen = set(args.only.split(",")) if args.only else {run.name for run in RUNS} | {"hold"}
    for gateway in gateways:
        for run in WARM_UP:
            load.result(load.begin(gateway, run), run)
    for number in range(rounds):
        for run in RUNS:
            if run.name in chosen:
                say(f"round {number + 1} of {rounds}: {run.name}")
                for gateway in gateways:
                    if gateway.name == "router" or not run.cached:
                        measure(load, gateway, run, book)
    if "hold" in chosen:
        hold = hold_run(args)
        for gateway in gateways[1:]:
            say(f"{hold.clients} slow streams for {hold.seconds:.0f} s: {gateway.name}")
            measure_hold(load, gateway, hold, book)
    add_differences(book, gateways)


# ---------------------------------------------------------------- report


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def gate_of(figure: Figure, args: argparse.Namespace) -> float | None:
    """The gate; for the streams held it is their number."""
    return float(args.streams) if figure.name == "held" else figure.gate


def within(figure: Figure, value: float, limit: float) -> bool:
    """Whether the value keeps to the limit."""
    return value >= limit if figure.more_is_better else value <= limit


def verdict(figure: Figure, value: float | None, args: argparse.Namespace) -> str:
    """What the router's value means: target met, within the gate, or neither."""
    gate = gate_of(figure, args)
    if value is None or (gate is None and figure.target is None):
        return ""
    if figure.target is not None and within(figure, value, figure.target):
        return "target met"
    if gate is not None:
        return "gate met" if within(figure, value, gate) else "GATE MISSED"
    return "above target"


def number(value: float | None, digits: int) -> str:
    """A figure as text, "-" for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def report(args: argparse.Namespace, gateways: list[Gateway], book: Book) -> bool:
    """Prints the table as Markdown; returns whether no gate was missed."""
    names = [gateway.name for gateway in gateways[1:]]
    print("| | target | gate | " + " | ".join(names) + " | router, best round | verdict |")
    print("|---|---|---|" + "---|" * (len(names) + 2))
    passed = True
    for figure in FIGURES:
        values = {name: book.median(name, figure.name) for name in names}
        if not any(value is not None for value in values.values()):
            continue
        said = verdict(figure, values.get("router"), args)
        passed = passed and said != "GATE MISSED"
        cells = [number(limit, 2).rstrip("0").rstrip(".") if limit is not None else ""
                 for limit in (figure.target, gate_of(figure, args))]  # fmt: skip
        cells += [number(values[name], figure.digits) for name in names]
        cells += [number(book.best("router", figure), figure.digits), said]
        print(f"| {figure.label} | " + " | ".join(cells) + " |")
    for name, fault in book.faults:
        print(f"\nWRONG ANSWERS: {name}, {fault}")
    alone = number(book.median("direct", "latency"), 3), number(book.median("direct", "first"), 3)
    print(f"\n{book.answers:,} answers checked. The mock alone: small request {alone[0]} ms, "
          f"first token {alone[1]} ms.")  # fmt: skip
    return passed


# ---------------------------------------------------------------- command line


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    runs = ", ".join([*(run.name for run in RUNS), "hold"])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one round, slow streams for 5 s")
    add("--rounds", type=int, default=3, help="rounds of every load (default 3)")
    add("--router", default="", metavar="CMD", help="default: this Python, -m router")
    add("--no-router", action="store_true", help="peers only")
    add("--peers", default="", help="comma list: portkey, litellm")
    add("--peer-command", action="append", default=[], metavar="NAME=CMD", help="see above")
    add("--streams", type=int, default=500, help="slow streams to hold (default 500)")
    add("--only", default="", help=f"comma list of {runs}")
    add("--gate", action="store_true", help="exit 1 when the router misses a gate")
    return parser.parse_args(argv)


def raise_file_limit() -> None:
    """Two thousand streams need more open files than the usual soft limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    args = parse_arguments(argv)
    book = Book()
    try:
        raise_file_limit()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            (folder / "text").write_text(TEXT)
            load = Load(compile_tool("load", folder), folder)
            port = stack.enter_context(mock_provider(folder))
            gateways = build_gateways(args, folder, port)
            for gateway in gateways:
                stack.callback(gateway.stop)
            measure_all(args, load, gateways, book)
    except BenchError as problem:
        say(f"bench: {problem}")
        return 2
    passed = report(args, gateways, book)
    wrong = any(name in ("direct", "router") for name, _ in book.faults)
    return 1 if wrong or (args.gate and not passed) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
