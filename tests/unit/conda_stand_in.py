"""Stands in for the command lines of conda, mamba and micromamba: what create_env.py asks of them, solved by rattler.

None of them can be installed from a package index. What is real here: the solve, the packages, their installation and
conda-meta. What is not: the programs' own options, prompts and messages. A test writes a file that runs main().
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
    """Do what the command line says to the environments below `root`/envs."""
    calls = root / "calls"
    with calls.open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create").add_argument("--name", required=True)
    env = commands.add_parser("env").add_subparsers(dest="what", required=True)
    env.add_parser("list").add_argument("--json", action="store_true", required=True)
    update = env.add_parser("update")
    update.add_argument("--prefix", type=Path, required=True)
    update.add_argument("--file", type=Path, required=True)
    update.add_argument("--prune", action="store_true")
    args = parser.parse_args()
    if args.command == "create":
        if os.environ.get("CONDA_ALWAYS_YES") != "true" or os.environ.get("MAMBA_ALWAYS_YES") != "true":
            raise OSError("it would ask whether to go on")
        (root / "envs" / args.name / "conda-meta").mkdir(parents=True)
        (root / "envs" / args.name / "conda-meta" / "history").touch()
    elif args.what == "list":
        print(json.dumps({"envs": [str(root), *map(str, sorted((root / "envs").glob("*")))]}))
    else:
        asyncio.run(fill(root, args.prefix, yaml.safe_load(args.file.read_text()), args.prune))


async def fill(root: Path, prefix: Path, wanted: dict[str, list[str]], prune: bool) -> None:
    """Install what the file lists; with `prune`, remove what it does not list."""
    # Here, as the other commands need none of it and start in half the time.
    from rattler import Channel, Gateway, MatchSpec, PrefixRecord, Subdir, VirtualPackage, install, solve

    alias = os.environ["CONDA_CHANNEL_ALIAS"]
    channels = [Channel(f"{alias}/{name}") for name in wanted["channels"] if name != "nodefaults"]
    have = [PrefixRecord.from_path(file) for file in (prefix / "conda-meta").glob("*.json")]
    specs = [MatchSpec(spec) for spec in wanted["dependencies"]]
    if not prune:
        named = {spec.name.normalized for spec in specs if spec.name}
        specs += [MatchSpec(record.name.normalized) for record in have if record.name.normalized not in named]
    records = await solve(
        channels,
        specs,
        gateway=Gateway(cache_dir=root / "pkgs"),
        platforms=[Subdir.current(), Subdir("noarch")],
        locked_packages=have,
        virtual_packages=VirtualPackage.detect(),
    )
    await install(records, prefix, cache_dir=root / "pkgs", installed_packages=have, show_progress=False)


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
