# How a container starts. It copies the workspace from the share to its own disk, and checks it against CODE_SHA256,
# which Azure Resource Manager hands to it and the share does not: whoever can write to the share cannot change what
# runs here. Models and Python environments stay on the share; infra/environment.sh checks the environment.
refuse() { echo "error: $1" >&2; exit 1; }
workspace=$(mktemp -d)
cd "$workspace"
cp "$WORKSPACE_MOUNT/.azure-code/$CODE_SHA256.tar" code.tar ||
  refuse "The share does not have the workspace that was sent: run \`python infra/azure.py run\` (the app: deploy)."
echo "$CODE_SHA256  code.tar" | sha256sum --check --status || {
  rm -f "$WORKSPACE_MOUNT/.azure-code/$CODE_SHA256.tar" || true # so that the next command sends it again
  refuse "The code on the share was changed there, and nothing of it ran: find out who can write to the share, then run \`python infra/azure.py run\` (the app: deploy), which sends it again."
}
tar -xf code.tar
rm code.tar
cut -c 67- .data.sha256 |
  tar -c --dereference --no-recursion -C "$WORKSPACE_MOUNT" --verbatim-files-from -T - | tar -x || true # checked next
[ ! -s .data.sha256 ] || sha256sum --check --quiet .data.sha256 || { # the app has none
  rm -f "$WORKSPACE_MOUNT/.azure-sync.json" || true # so that the next command sends all files again
  refuse "These data files on the share are not the ones that were sent, and nothing ran: find out who can write to the share, then run \`python infra/azure.py run\`, which sends them again."
}
mkdir -p "$WORKSPACE_MOUNT/models" "$WORKSPACE_MOUNT/.cache" 2>/dev/null || true # the app cannot, and needs no new ones
ln -s "$WORKSPACE_MOUNT/models" "$WORKSPACE_MOUNT/.cache" .
