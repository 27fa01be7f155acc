"""Fine-tune and serve this workspace in Azure Container Apps, through the Azure CLI: run `az login` first.

provision finetuning        create the job, its share and logs; shows the changes, then asks (--dry-run, --yes)
secret set HF_TOKEN         a secret for the job (--for inference: the app), from a prompt, a pipe or the variable
run                         send the changes, start the job, follow its log (unless --no-wait)
logs --follow               the log of the newest run
status                      the state of the runs and the app
pull                        download the results to models/, to chat with the tuned model here
provision inference         create the app that serves the model
deploy                      send the changes, restart the app, wait until the model responds
endpoint                    the app's address
estimate                    hours and cost of a run
destroy                     delete all of it; lists it first and asks for the group's name
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from az import AzureError, shown


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; report a user error in one sentence."""
    options = parse(arguments)
    try:
        command(options)
    except (AzureError, OSError) as error:
        if options.debug:
            return print_error("".join(traceback.format_exception(error)))
        return print_error(error)
    except ModuleNotFoundError as error:
        return print_error(
            f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`, then use its Python."
        )
    except KeyboardInterrupt:
        print("\nStopped here; what runs in Azure continues. Run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


def print_error(error: object) -> int:
    """Print an error; return the exit status."""
    print(f"error: {shown(error)}", file=sys.stderr)
    return 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command and its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    provision = commands.add_parser("provision", help="create what fine-tuning or inference needs")
    provision.add_argument("purpose", choices=("finetuning", "inference"))
    provision.add_argument("--yes", action="store_true", help="do not ask")
    provision.add_argument("--dry-run", action="store_true", help="only show what would be created")
    secret = commands.add_parser("secret", help="give the job a secret")
    secret.add_argument("action", choices=("set",))
    secret.add_argument("name", help="the variable that the job sees, for example HF_TOKEN")
    secret.add_argument(
        "--for",
        choices=("finetuning", "inference"),
        default="finetuning",
        dest="purpose",
        help="the job's or the app's",
    )
    run = commands.add_parser("run", help="send the changes and start the job")
    run.add_argument("--no-wait", action="store_true", help="do not follow the log")
    logs = commands.add_parser("logs", help="the log of the newest run")
    logs.add_argument("--follow", action="store_true", help="until the run ends")
    for name, text in {
        "status": "the state of the runs and the app",
        "pull": "download the results to models/",
        "deploy": "send the changes, restart the app, wait until the model responds",
        "endpoint": "the app's address",
        "estimate": "hours and cost of a run",
        "destroy": "delete everything that was created",
    }.items():
        commands.add_parser(name, help=text)
    return parser.parse_args(arguments)


def command(options: argparse.Namespace) -> None:
    """Run a command. Raises AzureError."""
    import app
    import deployment
    import destroy
    import logs
    import price
    import run
    import secret

    def status() -> None:
        run.status()
        app.status()

    commands: dict[str, Callable[[], None]] = {
        "provision": lambda: deployment.provision(options.purpose, options.yes, options.dry_run),
        "secret": lambda: secret.set_secret(options.name, options.purpose),
        "run": lambda: run.run(wait=not options.no_wait),
        "logs": lambda: logs.logs(options.follow),
        "status": status,
        "pull": run.pull,
        "deploy": app.deploy,
        "endpoint": app.endpoint,
        "estimate": price.estimate,
        "destroy": destroy.destroy,
    }
    commands[options.command]()


if __name__ == "__main__":
    sys.exit(main())
