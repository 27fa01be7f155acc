"""Stands in for the command lines of conda, mamba and micromamba: what create_env.py asks of them, solved by rattler.

None of them can be installed from a package index. What is real here: the solve, the packages, their installation and
conda-meta. What is not: the programs' own options, prompts and messages. Some manners of conda 26.7.1, which was run by
hand against a workspace, are copied: `conda list` forgets packages whose files pip has replaced; without
--override-channels each command asks the user's channels, and fails if their terms are not accepted; `nodefaults` is a
channel that is not there. A test writes a file that runs main().
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

import yaml


def main(root: Path) -> None:
    """Do what the command line says to the environments of `root` and of CONDA_ENVS_DIRS."""
    calls = root / "calls"
    with calls.open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    args = parsed()
    folders = [Path(folder) for folder in os.environ.get("CONDA_ENVS_DIRS", "").split(os.pathsep) if folder]
    folders.append(Path(os.environ.get("MAMBA_ROOT_PREFIX", root)) / "envs")
    if args.command == "env" and args.what == "list":
        print(
            json.dumps({"envs": [str(root), *(str(path) for folder in folders for path in sorted(folder.glob("*")))]})
        )
    elif args.command == "info":
        # mamba and micromamba have changed the key
        print(json.dumps({os.environ.get("STAND_IN_KEY", "envs_dirs"): list(map(str, folders))}))
    elif args.command == "list":
        forget(args.prefix)
    elif args.command == "remove":
        asyncio.run(change(root, args.prefix, channels_for(args), remove=args.names))
    elif args.command == "env":  # create, by hand
        wanted = yaml.safe_load(args.file.read_text())
        prefix = root / "envs" / wanted["name"]
        (prefix / "conda-meta").mkdir(parents=True)
        channels = [*wanted["channels"], *users_channels()]
        asyncio.run(change(root, prefix, channels, wanted["dependencies"]))
    else:
        if os.environ.get("CONDA_ALWAYS_YES") != "true" or os.environ.get("MAMBA_ALWAYS_YES") != "true":
            raise OSError("it would ask whether to go on")
        (args.prefix / "conda-meta").mkdir(parents=True, exist_ok=args.command == "install")
        (args.prefix / "conda-meta" / "history").touch()
        asyncio.run(change(root, args.prefix, channels_for(args), args.names, again=args.force_reinstall))


def parsed() -> argparse.Namespace:
    """Return the command line: what conda 26, mamba 2 and micromamba 2 take of it."""
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("create", "install", "remove"):
        command = commands.add_parser(name)
        command.add_argument("--prefix", type=Path, required=True)
        if name != "remove" or parser.prog == "conda":
            command.add_argument("--override-channels", action="store_true")
            command.add_argument("--channel", action="append", default=[])
        if name == "remove":
            command.add_argument("--force", action="store_true", required=True)
        else:
            command.add_argument("--force-reinstall", action="store_true")
        if name == "create" and parser.prog == "conda":
            command.add_argument("--no-default-packages", action="store_true", required=True)
        command.add_argument("names", nargs="*" if name == "create" else "+")
    commands.add_parser("info").add_argument("--json", action="store_true", required=True)
    commands.add_parser("list").add_argument("--prefix", type=Path, required=True)
    env = commands.add_parser("env").add_subparsers(dest="what", required=True)
    env.add_parser("list").add_argument("--json", action="store_true", required=True)
    env.add_parser("create").add_argument("-f", dest="file", type=Path, required=True)
    return parser.parse_args()


def users_channels() -> list[str]:
    """Return the channels of the user's .condarc, which conda adds unless they are overridden."""
    if os.environ.get("STAND_IN_TERMS"):
        # conda's plugin looks at these channels before each command, also where nothing is downloaded.
        raise OSError("CondaToSNonInteractiveError: Terms of Service have not been accepted for the following channels")
    return []


def channels_for(args: argparse.Namespace) -> list[str]:
    """Return the channels that a command asks."""
    named = getattr(args, "channel", [])
    overridden = getattr(args, "override_channels", Path(sys.argv[0]).name != "conda" and args.command == "remove")
    return named if overridden else [*named, *users_channels()]


def forget(prefix: Path) -> None:
    """Delete the records of packages whose files pip has replaced, as `conda list` does: it believes the files."""
    for file in (prefix / "conda-meta").glob("*.json"):
        infos = [path for path in json.loads(file.read_text())["files"] if path.endswith(".dist-info/METADATA")]
        if any(not (prefix / path).exists() for path in infos):
            file.unlink()


async def change(
    root: Path,
    prefix: Path,
    channels: list[str],
    add: list[str] | None = None,
    remove: list[str] | None = None,
    again: bool = False,
) -> None:
    """Install and remove packages; `again`: those that are named even if they are there."""
    # Here, as the other commands need none of it and start in half the time.
    from rattler import Channel, Gateway, MatchSpec, PrefixRecord, Subdir, VirtualPackage, install, solve

    alias = os.environ["CONDA_CHANNEL_ALIAS"]
    have = [PrefixRecord.from_path(file) for file in (prefix / "conda-meta").glob("*.json")]
    specs = [MatchSpec(spec) for spec in add or []]
    named = {spec.name.normalized for spec in specs if spec.name} | set(remove or [])
    specs += [MatchSpec(record.name.normalized) for record in have if record.name.normalized not in named]
    if not add:  # `--force` removes without a solve
        records = [record for record in have if record.name.normalized not in named]
    else:
        records = await solve(
            [Channel(f"{alias}/{name}") for name in channels],
            specs,
            gateway=Gateway(cache_dir=root / "pkgs"),
            platforms=[Subdir.current(), Subdir("noarch")],
            locked_packages=have,
            virtual_packages=VirtualPackage.detect(),
        )
    reinstall = {record.name.normalized for record in records if record.name.normalized in named} if again else None
    await install(
        records,
        prefix,
        cache_dir=root / "pkgs",
        installed_packages=have,
        show_progress=False,
        reinstall_packages=reinstall,
    )


def run(root: Path) -> None:
    """Run main() and end as conda does: with its reason on stderr, and status 1."""
    reason = ""
    try:
        main(root)
    except Exception as error:
        reason = f"CondaError: {error}"
    print(reason, end="\n" if reason else "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(bool(reason))  # rattler's threads and Python's usual end do not get on: one in some runs crashed
