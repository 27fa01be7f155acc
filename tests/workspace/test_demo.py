"""The demo as a user runs it: each command is its own process, started in another folder, with the network watched.

The processes get none of the variables that silence libraries (CI, HF_HUB_OFFLINE …): the product has to do that.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import RENDERED

# What a machine of a user's does not set, and what would hide a connection that the product makes.
FOREIGN = re.compile(
    r"CI|GITHUB_.*|TF_BUILD|.*_PROXY|XDG_.*|HF_.*|TRANSFORMERS_.*|.*TELEMETRY.*|DO_NOT_TRACK|GRADIO_.*|OMP_.*"
    r"|DISPLAY|WAYLAND_DISPLAY|BROWSER|COLUMNS|LINES|TERM|NO_COLOR|FORCE_COLOR|PYTEST_.*|PYTHON.*",
    re.IGNORECASE,
)
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none"]
STRACE += ["-e", "trace=connect,sendto,sendmsg,sendmmsg,openat"]
WATCHED = "(a Python started)"
# Python sees the name that is looked up even where the machine has no name server; strace sees what Python does not.
SITECUSTOMIZE = f"""
import os, sys

def record(line):
    with open(os.environ["WATCHED_HOSTS"], "a") as file:
        file.write(line + "\\n")

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        record(str(arguments[0]))
    elif event == "socket.getnameinfo":
        record(str(arguments[0][0]))
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        record(str(arguments[1][0]))
    elif event == "webbrowser.open":
        record("a browser, for " + arguments[0])

sys.addaudithook(watch)
record("{WATCHED}")
"""
STEPS = ("setup/get_model.py", "finetuning/invoke_olive.py --check", "finetuning/invoke_olive.py")
CONSOLE, PAGE = "inference/console_chat.py", "inference/gradio_chat.py"
EXPORT, SMOKE, TINY = "finetuning/export.py", "finetuning/invoke_olive.py --smoke", "finetuning/training/tiny_model.py"
SERVED = 30  # seconds; ONNX Runtime reports for the first time 4 to 15 seconds after a model is loaded


@dataclass(frozen=True)
class Watch:
    """Where what a process does is written down, and the command and variables that make it so."""

    folder: Path
    command: list[str]
    environment: dict[str, str]

    def hosts(self) -> set[str]:
        """Return the hosts off this machine that Python looked up or connected to."""
        hosts = (self.folder / "hosts").read_text().splitlines()
        assert WATCHED in hosts
        return {host for host in hosts if host not in (WATCHED, "None", "localhost") and not is_loopback(host)}

    def calls(self) -> list[str]:
        """Return the system calls by which any part of the process, or a child of it, went off this machine."""
        return [call for call in (self.folder / "calls").read_text(errors="replace").splitlines() if leaves(call)]


@dataclass
class Demo:
    """A workspace whose demo has run, and what its commands said."""

    folder: Path
    done: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)
    watches: dict[str, Watch] = field(default_factory=dict)
    server: subprocess.Popen[str] | None = None
    ready: float = 0  # when its model was loaded
    after_check: list[str] = field(default_factory=list)
    run_json: dict[str, Any] = field(default_factory=dict)
    page_says: Any = None
    example: dict[str, str] = field(default_factory=dict)


def watched(folder: Path) -> Watch:
    """Prepare to watch a process, in a new folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (folder.parent / "home").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    environment |= {"HOME": str(folder.parent / "home"), "PYTHONPATH": str(folder)}
    environment |= {"WATCHED_HOSTS": str(folder / "hosts")}
    strace = [] if cannot_trace() else [*STRACE, "-o", str(folder / "calls")]
    return Watch(folder, [*strace, sys.executable], environment)


def cannot_trace() -> str:
    """Return why system calls cannot be watched here, "" when they can."""
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace does not work here: {done.stderr.strip()}" if done.returncode else ""


def is_loopback(host: str) -> bool:
    """Tell whether this is an address, and one of this machine."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return False


def leaves(call: str) -> bool:
    """Tell whether a line of strace's is a connection off this machine, or a part of looking up a name."""
    if re.search(r'"(/etc/resolv\.conf|/etc/hosts|/run/systemd/resolve/.*)"', call):
        return True
    port, host = re.search(r"_port=htons\((\d+)\)", call), re.search(r'(?:_addr\(|AF_INET6, )"([^"]*)"', call)
    if "AF_INET" not in call:
        return False
    return not (port and host and port[1] != "53" and is_loopback(host[1]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo from the model to the page in a fresh workspace."""
    folder = tmp_path_factory.mktemp("demo")
    demo = Demo(folder / "my workspace")  # a space, as in many users' paths
    shutil.copytree(RENDERED, demo.folder, ignore=shutil.ignore_patterns(".venv", "models", ".git", "__pycache__"))
    for step in STEPS:
        start(demo, step)
        if step.endswith("--check"):
            demo.after_check = sorted(path.name for path in demo.folder.glob("models/*"))
    assert demo.done[STEPS[-1]].returncode == 0, demo.done[STEPS[-1]]
    demo.run_json = json.loads((demo.folder / "models" / "run.json").read_text(encoding="utf-8"))
    demo.example = next(row for row in demo.run_json["examples"] if row["before"] != row["after"])
    start(demo, CONSOLE, "--prompt", demo.example["question"])
    ask_the_page(demo)
    return demo


@pytest.fixture(scope="module")
def exported(demo: Demo) -> Iterator[Demo]:
    """Run the other commands in a copy of the workspace, and serve its int4 model while the tests below run."""
    folder = demo.folder.parent / "exported"
    folder.mkdir()
    exported = Demo(folder / "workspace", example=demo.example)
    shutil.copytree(demo.folder, exported.folder)
    for step in (EXPORT, SMOKE):
        start(exported, step)
    shutil.rmtree(exported.folder / "models" / "demo")
    start(exported, TINY, path=exported.folder / "finetuning")
    start(exported, CONSOLE, "--engine", "onnx", "--prompt", demo.example["question"])
    with serving(exported, "--engine", "onnx") as address:
        exported.page_says = ask(address, demo.example["question"])
        yield exported


def start(demo: Demo, step: str, *arguments: str, path: Path | None = None) -> None:
    """Run a command of the workspace to its end, from another folder; `path` is where it also imports from."""
    script, *options = step.split()
    watch = demo.watches[step] = watched(demo.folder.parent / re.sub(r"\W", "-", step))
    more = {"PYTHONPATH": f"{watch.folder}{os.pathsep}{path}"} if path else {}
    demo.done[step] = subprocess.run(
        [*watch.command, str(demo.folder / script), *options, *arguments],
        cwd=watch.folder,
        env=watch.environment | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def ask_the_page(demo: Demo) -> None:
    """Serve the page, ask it the example's question, and end it as a user does."""
    with serving(demo) as address:
        demo.page_says = ask(address, demo.example["question"])
        end(demo)


@contextlib.contextmanager
def serving(demo: Demo, *options: str) -> Iterator[str]:
    """Serve the page; yield its address when it answers."""
    watch = demo.watches[PAGE] = watched(demo.folder.parent / "page")
    with (watch.folder / "stderr").open("w", encoding="utf-8") as errors:
        server = demo.server = subprocess.Popen(
            [*watch.command, str(demo.folder / PAGE), "--port", "0", *options],
            cwd=watch.folder,
            env=watch.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            start_new_session=True,
            # a shell's background jobs ignore it, and so would their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        assert server.stdout
        said, address = "", None
        for line in server.stdout:
            said += line
            if address := re.match(r"Chat at (http\S+)", line):
                break
        demo.ready = time.monotonic()
        demo.done[PAGE] = subprocess.CompletedProcess(server.args, -1, said)
        assert address, (watch.folder / "stderr").read_text(encoding="utf-8")
        yield address[1]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def end(demo: Demo) -> None:
    """End the page as a user does, with Ctrl-C."""
    assert demo.server and demo.server.stdout
    os.killpg(demo.server.pid, signal.SIGINT)
    done = demo.done[PAGE]
    done.stdout += demo.server.stdout.read()
    done.returncode = demo.server.wait(timeout=60)
    done.stderr = (demo.watches[PAGE].folder / "stderr").read_text(encoding="utf-8")


def ask(address: str, question: str) -> Any:
    """Ask the page's chat with the settings that it suggests; return the answer that it ends with."""
    call = f"{address}gradio_api/call/chat"
    body = json.dumps({"data": [question, "", 256, 0, 1, None]}).encode()
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as response:
        event = json.load(response)["event_id"]
    with direct.open(f"{call}/{event}", timeout=60) as response:
        stream = response.read().decode()
    complete = re.search(r"event: complete\ndata: (.*)", stream)
    assert complete, stream
    return json.loads(complete[1])[0]


def talk(demo: Demo, *options: str, questions: list[str]) -> list[str]:
    """Ask in a terminal, each question in a new chat; return the answers."""
    watch = watched(demo.folder.parent / f"terminal{''.join(options)}")
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(demo.folder / CONSOLE), *options],
        cwd=watch.folder,
        env=watch.environment | {"TERM": "dumb"},
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
    )
    os.close(screen)
    os.write(keyboard, "".join(f"{question}\n/clear\n" for question in questions).encode() + b"#end\n")
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while piece := os.read(keyboard, 4096):
            shown += piece
    os.close(keyboard)
    text = shown.decode().replace("\r\n", "\n")
    assert process.wait(timeout=60) == 0, text
    return re.findall(r"Model: (.*)\n", text)


def test_the_int4_model_gives_the_answer_of_the_evaluation(exported: Demo) -> None:  # first: its server runs meanwhile
    assert {step: done.returncode for step, done in exported.done.items() if step != PAGE} == dict.fromkeys(
        (EXPORT, SMOKE, TINY, CONSOLE), 0
    ), exported.done
    assert "Built the demo model" in exported.done[TINY].stdout
    assert exported.done[CONSOLE].stdout == f"{exported.example['after']}\n"
    assert exported.page_says == exported.example["after"]


def test_each_command_succeeds_and_names_the_next(demo: Demo) -> None:
    assert {step: demo.done[step].returncode for step in (*STEPS, CONSOLE)} == dict.fromkeys((*STEPS, CONSOLE), 0)
    for step, following in zip(STEPS, (*STEPS[1:], CONSOLE), strict=True):
        assert demo.done[step].stdout.splitlines()[-1].endswith(f"python {following}")


def test_ctrl_c_ends_the_page(demo: Demo) -> None:
    assert demo.done[PAGE].returncode in (0, 130), demo.done[PAGE].stderr


def test_no_command_shows_the_warnings_of_its_libraries(demo: Demo) -> None:
    said = {step: done.stderr for step, done in demo.done.items()}
    assert said == dict.fromkeys((*STEPS, CONSOLE, PAGE), "")
    for step, done in demo.done.items():
        assert not re.search(r"[\r\x1b]|warning|deprecat|%\|", done.stdout, re.IGNORECASE), (step, done.stdout)


def test_the_model_is_built_and_the_check_trains_nothing(demo: Demo) -> None:
    assert "Built the demo model in" in demo.done[STEPS[0]].stdout
    assert demo.after_check == ["demo"]
    assert "800 rows to train on, 160 held out\n" in demo.done[STEPS[1]].stdout


def test_the_demo_goes_from_chance_to_nearly_all_right_on_held_out_rows(demo: Demo) -> None:
    assert "800 rows to train on, 160 held out\n" in demo.done[STEPS[2]].stdout
    before, after = (demo.run_json["metrics"][moment]["accuracy"] for moment in ("before", "after"))
    assert before <= 0.35
    assert after >= 0.95
    for accuracy in (before, after):
        assert abs(accuracy * 160 - round(accuracy * 160)) < 0.01, "not a share of 160 rows"
    asked = {
        json.loads(row)["messages"][-2]["content"]
        for row in (demo.folder / "dataset" / "sample-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert {example["question"] for example in demo.run_json["examples"]} <= asked


def test_the_run_ends_with_its_metrics_and_the_names_of_its_files(demo: Demo) -> None:
    end = demo.done[STEPS[2]].stdout.partition("Evaluating the tuned model")[2]
    assert max(map(len, end.splitlines())) <= 80
    for moment in ("before", "after"):
        assert f"{demo.run_json['metrics'][moment]['accuracy']:.2%}" in end
    named = re.findall(r"^  \w+ +(models/\S+)$", end, re.MULTILINE)
    assert named == ["models/adapter", "models/run.json", "models/report/index.html"]
    assert all((demo.folder / path).exists() for path in named)


def test_the_console_and_the_page_give_the_answer_of_the_evaluation(demo: Demo) -> None:
    assert demo.done[CONSOLE].stdout == demo.example["after"] + "\n"
    assert demo.page_says == demo.example["after"]


@pytest.mark.parametrize(("options", "moment"), [((), "after"), (("--baseonly",), "before")], ids=["tuned", "base"])
def test_a_chat_gives_the_answers_of_the_evaluation(demo: Demo, options: tuple[str, ...], moment: str) -> None:
    examples = [row for row in demo.run_json["examples"] if row["before"] != row["after"]][:3]
    assert len(examples) == 3
    answers = talk(demo, *options, questions=[example["question"] for example in examples])
    assert answers == [example[moment] for example in examples]


@pytest.mark.parametrize("step", [*STEPS, CONSOLE, PAGE])
def test_no_host_off_this_machine_is_looked_up(demo: Demo, step: str) -> None:
    assert demo.watches[step].hosts() == set()


@pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace())
@pytest.mark.parametrize("step", [*STEPS, CONSOLE, PAGE])
def test_no_system_call_leaves_this_machine(demo: Demo, step: str) -> None:
    assert demo.watches[step].calls() == []


@pytest.fixture(scope="module")
def watched_long(exported: Demo) -> Demo:
    """Let the server of the int4 model run for half a minute altogether, and end it."""
    time.sleep(max(0.0, exported.ready + SERVED - time.monotonic()))
    end(exported)
    return exported


@pytest.mark.parametrize("step", [EXPORT, SMOKE, TINY, CONSOLE, PAGE])
def test_no_host_is_looked_up_by_what_loads_the_int4_model(watched_long: Demo, step: str) -> None:
    assert watched_long.watches[step].hosts() == set()


@pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace())
@pytest.mark.parametrize("step", [EXPORT, SMOKE, TINY, CONSOLE, PAGE])
def test_no_system_call_of_what_loads_the_int4_model_leaves_this_machine(watched_long: Demo, step: str) -> None:
    assert watched_long.watches[step].calls() == []


def test_no_library_keeps_an_id_of_this_machine(demo: Demo, watched_long: Demo) -> None:
    homes = [demo.folder.parent / "home", watched_long.folder.parent / "home"]
    kept = [path.relative_to(home).as_posix() for home in homes for path in home.rglob("*") if path.is_file()]
    assert not [path for path in kept if re.search(r"id$|microsoft|telemetry", path, re.IGNORECASE)]
    assert watched_long.done[PAGE].returncode in (0, 130)


STRAY = """
import contextlib, socket, sys

def stop(event, arguments):  # after the watch has seen it, and before a name server does
    if event == "socket.getaddrinfo":
        raise OSError

sys.addaudithook(stop)
with contextlib.suppress(OSError):
    socket.getaddrinfo("example.invalid", 80)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
    udp.connect(("127.0.0.1", 9))
    udp.connect(("192.0.2.1", 9))  # sends nothing
with contextlib.suppress(OSError):
    open("/etc/resolv.conf")
"""


def test_the_watch_sees_a_process_that_leaves_this_machine(tmp_path: Path) -> None:
    watch = watched(tmp_path / "stray")
    subprocess.run([*watch.command, "-c", STRAY], env=watch.environment, check=True)
    assert watch.hosts() == {"example.invalid", "192.0.2.1"}
    if not cannot_trace():
        assert [re.findall(r'"([^"]+)"', call) for call in watch.calls()] == [["192.0.2.1"], ["/etc/resolv.conf"]]


def test_the_watch_distinguishes_this_machine_from_others() -> None:
    ipv4 = '7 connect(3, {{sa_family=AF_INET, sin_port=htons({}), sin_addr=inet_addr("{}")}}, 16) = 0'
    ipv6 = (
        '7 sendto(3, "a", 1, 0, {{sa_family=AF_INET6, sin6_port=htons({}), sin6_flowinfo=htonl(0), '
        'inet_pton(AF_INET6, "{}", &sin6_addr), sin6_scope_id=0}}, 28 <unfinished ...>'
    )
    assert not leaves(ipv4.format(80, "127.0.0.1"))
    assert not leaves(ipv6.format(80, "::1"))
    assert not leaves(ipv6.format(80, "::ffff:127.0.0.1"))
    assert not leaves('7 connect(3, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT')
    assert not leaves('7 openat(AT_FDCWD, "/etc/passwd", O_RDONLY|O_CLOEXEC) = 3')
    assert leaves(ipv4.format(53, "127.0.0.53"))
    assert leaves(ipv4.format(443, "192.0.2.1"))
    assert leaves(ipv6.format(443, "2001:db8::1"))
    assert leaves("7 sendmsg(3, {msg_name={sa_family=AF_INET, ...}}, 0) = 0")
