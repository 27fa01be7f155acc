# The Python environment of the job and the app, in the folder .cache on the share: the first start creates it from
# the lock, later ones reuse it. Source it in a workspace: `source infra/environment.sh`.
#
# The share is not trusted: an environment is sealed by infra/seal.py when it is complete, and checked at each start; one
# whose seal is broken is made again. Packages come from the index, by the hashes of the lock, not from a cache there.
#
# Each lock has its own environment, named by its hash: a run keeps its environment when the lock changes. It is
# created under another name and renamed at the end, so an interrupted one never counts as complete.

is_sealed() { [ -d "$environment" ] && python3 -I infra/seal.py "$environment"; }

# `set -e` has no effect before a `&&`: each step must report its own failure.
make_environment() {
  local new=$environment.new.$HOSTNAME.$$
  if ! command -v uv >/dev/null; then
    echo "infra/environment.sh: this image has no uv: choose one that has in infra/provision, then provision again." >&2
    return 1
  fi
  install() { UV_CACHE_DIR=$new/.uv uv pip install --quiet --no-deps --python "$new" "$@"; }
  echo "Installing $(grep -c == "$lock") locked packages; the next start finds them …"
  uv venv --quiet --relocatable --python "$(command -v python3)" "$new" &&
    { [ -z "$torch" ] || install --torch-backend cpu "$torch"; } &&
    install --requirement "$lock" &&
    rm -rf "$new/.uv" &&
    python3 -I infra/seal.py "$new" "${environment##*/}" &&
    { [ -d "$environment" ] || mv --no-target-directory "$new" "$environment"; }
  # It also exists if another start was faster. Remains of unfinished ones can be removed then.
  if ! is_sealed; then rm -rf "$new"; return 1; fi
  rm -rf "$environment".new.* || true
  echo "Ready after $SECONDS s."
}

device=$(sed -n 's/^device *= *"\([a-z]*\)".*/\1/p' setup/environment.toml)
lock=setup/requirements-$device.txt
hash=$({ python3 --version && cat "$lock"; } | sha256sum | cut -c 1-16) || return 1
environment=$WORKSPACE_MOUNT/.cache/environments/$device-$hash

# A share has no hard links. With compiled bytecode, Python starts in half the time; more would break the seal.
export UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYTHONDONTWRITEBYTECODE=1
# torch for the CPU is on an index of its own, whose files are not those that the lock has the hashes of.
torch=$([ "$device" = gpu ] || sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$lock")

if ! is_sealed && [ -e "$environment" ]; then
  echo "The Python environment on the share is not as it was made, so it is not used, and made again." >&2
  mv --no-target-directory "$environment" "$environment.new.broken.$$" || return 1
fi
{ [ -d "$environment" ] || make_environment; } && source "$environment/bin/activate" && unset ENVIRONMENT_KEY
