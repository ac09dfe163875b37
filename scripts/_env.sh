# Shared by scripts/test, scripts/demo and .ci/run; meant to be sourced.
#
#   jlora_env "test,dev"    makes .venv ready with these extras and sets $VENV_PYTHON
#
# Environment: PYTHON (the interpreter to build .venv from), JLORA_NO_VENV=1 (use the
# current Python as it is: no .venv, no installation).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf 'jlora: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# The minor version of an interpreter as "311", or nothing if it does not run.
python_tag() {
    "$1" -c 'import sys; print("%d%02d" % sys.version_info[:2] if sys.version_info[0] > 2 else 0)' \
        2>/dev/null || true
}

recent_enough() { [ "$(python_tag "$1" | grep -E '^[0-9]+$' || echo 0)" -ge 311 ]; }

# Print the interpreter to use: $PYTHON, else the first one that is recent enough.
find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        recent_enough "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer"
        echo "$PYTHON"
        return
    fi
    for name in python3 python python3.12 python3.11 python3.13 python3.14; do
        if recent_enough "$name"; then
            echo "$name"
            return
        fi
    done
    die "Python 3.11 or newer is needed and was not found; name one: PYTHON=/path/to/python $0"
}

make_venv() {
    say "creating .venv ($("$1" --version 2>&1))"
    if ! "$1" -m venv --clear "$VENV" >&2; then
        rm -rf "$VENV"
        die "creating .venv failed (Debian and Ubuntu: install python3-venv)"
    fi
}

# Show of pip's output only what tells a person that it moves on.
show_progress() {
    local line
    while IFS= read -r line; do
        case "$line" in
            *Downloading*" MB)"* | *Downloading*" GB)"*) say "  ${line#"${line%%[![:space:]]*}"}" ;;
            "Installing collected packages:"*) say "  installing $(echo "${line#*:}" | wc -w | tr -d ' ') packages" ;;
        esac
    done
}

# Install jlora with the extras $1, under the constraints file $2 (may be empty).
install_jlora() {
    local log="$VENV/jlora-install.log" target="$ROOT"
    [ -z "$1" ] || target="$ROOT[$1]"
    set -- install --disable-pip-version-check --progress-bar off --editable "$target" ${2:+--constraint "$2"}
    if ! PYTHONUNBUFFERED=1 "$VENV_PYTHON" -m pip "$@" 2>&1 | tee "$log" | show_progress; then
        tail -n 15 "$log" >&2
        die "the installation failed; all of pip's output is in $log"
    fi
}

# What the environment depends on: the package's metadata, the pins, and Python's version.
fingerprint() {
    "$VENV_PYTHON" -c '
import hashlib, pathlib, sys
data = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(sys.version.split()[0], hashlib.sha256(data).hexdigest())' "$ROOT/pyproject.toml" ${1:+"$1"}
}

jlora_env() {
    local extras="$1" tag constraints stamp print base
    if [ "${JLORA_NO_VENV:-}" = 1 ]; then
        VENV_PYTHON="$(find_python)"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    VENV_PYTHON="$VENV/bin/python"
    if ! recent_enough "$VENV_PYTHON"; then
        base="$(find_python)"
        make_venv "$base"
    elif [ -n "${PYTHON:-}" ] && [ "$(python_tag "$PYTHON")" != "$(python_tag "$VENV_PYTHON")" ]; then
        base="$(find_python)"
        say ".venv holds $("$VENV_PYTHON" --version), but PYTHON asks for another version"
        make_venv "$base"
    fi

    tag="$(python_tag "$VENV_PYTHON")"
    constraints="$ROOT/constraints/py$tag.txt"
    [ -f "$constraints" ] || constraints=""
    stamp="$VENV/jlora-stamp-${extras:-base}"
    print="$(fingerprint "$constraints")"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$print" ]; then
        return
    fi
    # Every installation holds the base, so the demo need not install again after the tests.
    if [ -z "$extras" ] && grep -qxF "$print" "$VENV"/jlora-stamp-* 2>/dev/null; then
        return
    fi

    [ -n "$constraints" ] || say "no pinned versions for this Python: taking the newest ones"
    say "installing jlora${extras:+[$extras]} into .venv (some minutes the first time)"
    rm -f "$stamp"
    install_jlora "$extras" "$constraints"
    echo "$print" >"$stamp"
    say "installed"
}
