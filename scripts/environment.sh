# Sourced by the scripts beside it: a virtual environment in the repository, made once and reused while it is current.
# Needs bash and a Python of 3.10 or newer. Speaks on standard error only.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
environment=$repository/.venv

# use_environment KIND: .venv holds fp4conv (KIND plain), or also the pinned test environment (KIND test). KIND servers
# is .venv-servers: fp4conv beside the servers' releases, which exclude those of the tests.
use_environment() {
  local kind=$1
  if [ "$kind" = servers ]; then environment=$repository/.venv-servers; fi
  is_current "$kind" && return
  local python
  python=$(find_python "$kind")
  echo "Making $environment with $("$python" --version) (once; some minutes, and the network, are needed)" >&2
  "$python" -m venv --clear "$environment"
  if [ "$kind" = test ]; then
    install --editable "$repository[test]" --constraint "$repository/constraints.txt"
  elif [ "$kind" = servers ]; then
    # Each server names releases of the same packages that the other excludes, and some that need a GPU: the list is whole.
    install torch --constraint "$repository/constraints-servers.txt"
    install --no-deps --requirement "$repository/constraints-servers.txt"
    install --no-deps --editable "$repository"
  else
    install --editable "$repository"
  fi
  stamp "$kind" > "$environment/fp4conv-$kind.stamp"
}

# What the environment follows from: where it lies, and the files that say what is in it.
stamp() {
  echo "$repository"
  case $1 in
    plain) cksum < "$repository/pyproject.toml" ;;
    test) cksum < "$repository/pyproject.toml" && cksum < "$repository/constraints.txt" ;;
    servers) cksum < "$repository/constraints-servers.txt" ;;
  esac
}

# The test environment serves the plain kind too.
is_current() {
  local kind
  for kind in "$1" test; do
    if [ -x "$environment/bin/fp4conv" ] && "$environment/bin/python" -c '' 2> /dev/null &&
      [ "$(stamp "$kind")" = "$(cat "$environment/fp4conv-$kind.stamp" 2> /dev/null)" ]; then
      return 0
    fi
  done
  return 1
}

# Print the first Python that will do. Tests prefer 3.11: below it some of what they compare with cannot be installed.
# Servers need it.
find_python() {
  local minor candidate found="" without_venv=""
  local minors="10"
  [ "$1" = test ] && minors="11 10"
  [ "$1" = servers ] && minors="11"
  for minor in $minors; do
    for candidate in ${PYTHON:-} python3 python python3.11 python3.12 python3.13 python3.14 python3.10; do
      "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $minor))" > /dev/null 2>&1 || continue
      if "$candidate" -c 'import ensurepip, venv' > /dev/null 2>&1; then
        found=$candidate
        break 2
      fi
      without_venv=${without_venv:-$candidate}
    done
  done
  if [ -n "$found" ]; then
    echo "$found"
  elif [ -n "$without_venv" ]; then
    local version
    version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fail "$without_venv cannot make virtual environments: its venv module is not installed." \
      "On Debian and Ubuntu: sudo apt install python$version-venv"
  else
    fail "No Python of 3.${minors##* } or newer was found ($(python3 --version 2>&1 || true))." \
      "Install one, or name one that is not on the PATH: PYTHON=/path/to/python3 $0"
  fi
}

install() {
  local log=$environment/install.log
  "$environment/bin/python" -m pip install --no-input --disable-pip-version-check "$@" > "$log" 2>&1 && return
  tail -n 15 "$log" >&2
  if grep -qE 'Failed to establish|Temporary failure|Name or service|unreachable|timed out|ProxyError|from versions: none' "$log"; then
    fail "The packages could not be downloaded." "Check the network (and HTTPS_PROXY, where there is a proxy); run $0 again."
  fi
  fail "pip could not install the packages; the whole log is $log" "Run $0 again once its last lines are dealt with."
}

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}
