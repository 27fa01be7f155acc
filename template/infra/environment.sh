# The Python environment of the job and the app, in the folder .cache on the share: the first start creates it from
# the lock, later ones reuse it. Source it in a workspace: `source infra/environment.sh`.
#
# Each lock has its own environment, named by its hash: a run keeps its environment when the lock changes. It is
# created under another name and renamed at the end, so an interrupted one never counts as complete.

# `set -e` has no effect before a `&&`: each step must report its own failure.
make_environment() {
  local new=$environment.new.$HOSTNAME.$$
  if ! command -v uv >/dev/null; then
    echo "infra/environment.sh: this image has no uv: choose one that has in infra/provision, then provision again." >&2
    return 1
  fi
  echo "Installing $(grep -c == "$lock") locked packages; the next start finds them …"
  uv venv --quiet --relocatable --python "$(command -v python3)" "$new" &&
    uv pip install --quiet --python "$new" --requirement "$lock" &&
    { [ -d "$environment" ] || mv --no-target-directory "$new" "$environment"; }
  # It also exists if another start was faster. Remains of unfinished ones can be removed then.
  if [ ! -d "$environment" ]; then rm -rf "$new"; return 1; fi
  rm -rf "$environment".new.* || true
  echo "Ready after $SECONDS s."
}

device=$(sed -n 's/^device *= *"\([a-z]*\)".*/\1/p' setup/environment.toml)
lock=setup/requirements-$device.txt
hash=$({ python3 --version && cat "$lock"; } | sha256sum | cut -c 1-16) || return 1
environment=$PWD/.cache/environments/$device-$hash

# A share has no hard links. With compiled bytecode, Python starts in half the time.
export UV_CACHE_DIR=$PWD/.cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
if [ "$device" = cpu ]; then export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-cpu}"; fi

{ [ -d "$environment" ] || make_environment; } && source "$environment/bin/activate"
