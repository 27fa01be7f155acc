# The Python environment of the job and of the app, in the folder .cache on the share: the first start makes it from
# the lock, every later one finds it. It is sourced, in a workspace: `source infra/environment.sh`.
#
# A lock has an environment of its own, named by its hash: who runs while the lock changes, keeps what it has. It is
# made under another name and renamed at the end, so that what was interrupted is never taken for complete.

# `set -e` does nothing before a `&&`: each step has to say itself that it failed.
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
  # It is there as well when another start was quicker; then what is left of unfinished ones can go.
  if [ ! -d "$environment" ]; then rm -rf "$new"; return 1; fi
  rm -rf "$environment".new.* || true
  echo "Ready after $SECONDS s."
}

device=$(sed -n 's/^device *= *"\([a-z]*\)".*/\1/p' setup/environment.toml)
lock=setup/requirements-$device.txt
hash=$({ python3 --version && cat "$lock"; } | sha256sum | cut -c 1-16) || return 1
environment=$PWD/.cache/environments/$device-$hash

# A share has no hard links. Compiled, Python starts in half the time.
export UV_CACHE_DIR=$PWD/.cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
if [ "$device" = cpu ]; then export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-cpu}"; fi

{ [ -d "$environment" ] || make_environment; } && source "$environment/bin/activate"
