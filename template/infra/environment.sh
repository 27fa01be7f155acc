# The Python environment of the job and of the app, in the folder .cache on the share: the first start makes it from the
# lock, every later one finds it. Sourced where a workspace is: `source infra/environment.sh`.
#
# A lock has an environment of its own, named by its hash: whoever runs while the lock changes keeps what it has. It is
# made under another name and then renamed, so that what was interrupted is never taken for complete.

# `set -e` does nothing before a `&&`: each step says itself that it failed.
make_environment() {
  local new=$environment.new.$HOSTNAME.$$
  command -v uv >/dev/null || { echo "infra/environment.sh: the image has no uv: take one that has, or install it there." >&2; return 1; }
  echo "Installing $(grep -c == "$lock") locked packages; the next start finds them …"
  mkdir -p "${environment%/*}" &&
    uv venv --quiet --relocatable --python "$(command -v python3)" "$new" &&
    uv pip install --quiet --python "$new" --requirement "$lock" || return 1
  # Another start may have been quicker: then its environment is as good as this one.
  mv --no-target-directory "$new" "$environment" 2>/dev/null || rm -rf "$new"
  echo "Ready after $SECONDS s."
}

device=$(sed -n 's/^device *= *"\([a-z]*\)".*/\1/p' setup/environment.toml)
lock=setup/requirements-$device.txt
environment=$PWD/.cache/environments/$device-$({ python3 --version; cat "$lock"; } | sha256sum | cut -c 1-16)

# Links and locks do not work between files on a share; compiled, Python starts in half the time.
export UV_CACHE_DIR=$PWD/.cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
if [ "$device" = cpu ]; then export UV_TORCH_BACKEND=cpu; fi

{ [ -d "$environment" ] || make_environment; } && source "$environment/bin/activate"
