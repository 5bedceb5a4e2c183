# Installs what a file of pins names into /opt/esper: `install.sh FILE [cuda|cpu]`.
#
# The installer is pinned too, and gone afterwards. It is not mounted from a stage of its own: where
# that stage comes from a cache, buildah 1.28 mounts nothing.
set -eu
beside=$(dirname "$0")
wanted=$1
case ${2-cuda} in
cuda) ;;
cpu)
    # Triton compiles for GPUs only. Its pin is the line of its name and the hashes that follow.
    awk '/^[a-z]/ { skip = /^triton==/ } !skip' "$wanted" > /tmp/pins.txt
    wanted=/tmp/pins.txt
    ;;
*)
    echo "ACCELERATOR: got $2; allowed: cuda, cpu" >&2
    exit 2
    ;;
esac
python3 -m venv /tmp/installer
/tmp/installer/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
    --no-deps --require-hashes -r "$beside/requirements-bootstrap.txt"
/tmp/installer/bin/uv pip install --quiet --python /opt/esper/bin/python --compile-bytecode \
    --no-deps --require-hashes -r "$wanted"
if [ "${2-cuda}" = cpu ]; then
    /opt/esper/bin/python "$beside/empty_cuda.py"
fi
rm -rf /tmp/installer /tmp/pins.txt /tmp/uv
