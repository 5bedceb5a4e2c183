# Installs PyTorch with the pins beside this file: `install_torch.sh cuda|cpu`.
set -eu
pins=$(dirname "$0")
case $1 in
cuda) cp "$pins/torch.txt" /tmp/torch.txt ;;
cpu)
    # Triton compiles for GPUs only. Its pin is the line of its name and the hashes that follow.
    awk '/^[a-z]/ { skip = /^triton==/ } !skip' "$pins/torch.txt" > /tmp/torch.txt
    ;;
*)
    echo "ACCELERATOR: got $1; allowed: cuda, cpu" >&2
    exit 2
    ;;
esac
/installer/bin/uv pip install --quiet --python /opt/esper/bin/python --compile-bytecode \
    --no-deps --require-hashes -r /tmp/torch.txt
if [ "$1" = cpu ]; then
    /opt/esper/bin/python "$pins/empty_cuda.py"
fi
rm -rf /tmp/torch.txt /tmp/uv
