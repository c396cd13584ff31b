#!/usr/bin/env bash
# Gets the real Prometheus and the real Triton that the tests start; no root, nothing outside the cache, no service started.
#
#   scripts/tools.sh [prometheus] [triton]     install what is missing (default: both); prints NAME=PATH for each
#   scripts/tools.sh where prometheus|triton   print the path of an installed one; exit 3 when it is not installed
#
# MESHCTL_CACHE   where they are kept, by version    (default ~/.cache/meshctl)
# PROMETHEUS_BIN  a Prometheus to use instead        (default: the one on PATH, then Debian's package)
# PYTHON          the Python that Triton's models run in; needs numpy   (default: .venv's, then python3)
#
# Prometheus is Debian's package, checked by apt's signatures. Triton is the tritonserver inside NVIDIA's nvidia-pytriton
# wheel, pinned by hash below; it brings its own libraries and runs without a GPU.
set -euo pipefail

readonly PYTRITON=nvidia-pytriton==0.7.0
readonly PYTRITON_SHA256=21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df # x86_64

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${MESHCTL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/meshctl}
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3) || python=

say() { printf 'tools: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

debian_release() { (. /etc/os-release 2>/dev/null && printf '%s%s' "${ID:-linux}" "${VERSION_ID:-}") || printf linux; }
# PYTHON's own version asked without starting it where possible: `where` runs often and must be quick.
python_version() { "$python" -S -E -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

prometheus_home() { printf '%s/prometheus-%s' "$cache" "$(debian_release)"; }
triton_home() { printf '%s/triton-%s-py%s' "$cache" "${PYTRITON##*==}" "$(python_version)"; }

where_prometheus() {
  if [[ -n ${PROMETHEUS_BIN:-} ]]; then
    [[ -x $PROMETHEUS_BIN ]] || die "PROMETHEUS_BIN=$PROMETHEUS_BIN is not an executable file"
    printf '%s\n' "$PROMETHEUS_BIN"
  elif command -v prometheus; then :
  else
    local bin; bin=$(prometheus_home)/usr/bin/prometheus
    [[ -x $bin ]] && printf '%s\n' "$bin"
  fi
}

where_triton() {
  [[ -n $python ]] || return 1
  local home; home=$(triton_home)
  [[ -x $home/pytriton/tritonserver/bin/tritonserver ]] && printf '%s\n' "$home"
}

# Downloads Debian packages into the current directory. Where apt's lists are missing or old, they are fetched into the cache,
# which needs no root and leaves the system's own lists alone.
apt_download() {
  command -v apt-get >/dev/null || die "no apt-get here: install $* yourself (for Prometheus: set PROMETHEUS_BIN)"
  local log; log=$(mktemp -p "$work")
  apt-get download "$@" >"$log" 2>&1 && return
  mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
  local private=(-o "Dir::State::lists=$cache/apt/lists" -o "Dir::Cache=$cache/apt" -o APT::Sandbox::User=)
  apt-get "${private[@]}" update >>"$log" 2>&1 && apt-get "${private[@]}" download "$@" >>"$log" 2>&1 ||
    { cat "$log" >&2; die "apt-get could not download $*: see above"; }
}

install_prometheus() {
  say "installing Prometheus into $(prometheus_home)"
  (cd "$work" && apt_download prometheus && dpkg -x prometheus_*.deb unpacked)
  "$work/unpacked/usr/bin/prometheus" --version >/dev/null 2>&1 || die "Debian's prometheus does not run on this machine"
  rm -rf "$(prometheus_home)" && mv "$work/unpacked" "$(prometheus_home)"
}

# The Python that Triton's model processes embed: a shared libpython is not everywhere where Python is.
install_libpython() {
  local version=$1 home=$2 found
  found=$("$python" -c 'import pathlib, sysconfig as s
for d in (s.get_config_var("LIBDIR"), s.get_config_var("LIBDIR") + "/" + (s.get_config_var("MULTIARCH") or "")):
    f = pathlib.Path(d, "libpython%s.so.1.0" % s.get_python_version())
    if f.exists(): print(f); break')
  mkdir -p "$home/libpython"
  if [[ -n $found ]]; then
    ln -s "$found" "$home/libpython/"
  else
    (cd "$work" && apt_download "libpython$version" && dpkg -x libpython"$version"_*.deb libpython)
    find "$work/libpython" -name "libpython$version.so.1.0" -exec cp {} "$home/libpython/" \;
  fi
}

install_triton() {
  [[ -n $python ]] || die "Triton needs a Python with pip and numpy: set PYTHON"
  [[ $(uname -sm) == "Linux x86_64" ]] || die "no Triton is pinned for $(uname -sm), only for Linux x86_64"
  local version home=$work/triton
  version=$(python_version)
  say "installing Triton for Python $version into $(triton_home)"
  "$python" -c 'import numpy' 2>/dev/null || die "$python has no numpy, which Triton's Python models need"
  printf '%s --hash=sha256:%s\n' "$PYTRITON" "$PYTRITON_SHA256" >"$work/pin.txt"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest "$work" --requirement "$work/pin.txt" ||
    die "pip could not download $PYTRITON (hash-pinned): see above"
  "$python" -m zipfile -e "$work"/nvidia_pytriton-*.whl "$home"
  local server=$home/pytriton/tritonserver
  [[ -f $server/python_backend_stubs/$version/triton_python_backend_stub ]] ||
    die "$PYTRITON has no stub for Python $version; it has: $(ls "$server/python_backend_stubs" | tr '\n' ' ')"
  mv "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
  rm -rf "$server/python_backend_stubs" # one Python's is enough: 20 MB less
  chmod +x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub"
  install_libpython "$version" "$home"
  local file missing
  missing=$(for file in "$server"/bin/tritonserver "$server"/backends/python/{libtriton_python.so,triton_python_backend_stub}; do
    LD_LIBRARY_PATH=$home/libpython ldd "$file"
  done | awk '/not found/ {print $1}' | sort -u)
  [[ -z $missing ]] || die "Triton needs libraries that this machine lacks: $missing"
  rm -rf "$(triton_home)" && mv "$home" "$(triton_home)"
}

main() {
  if [[ ${1:-} == where ]]; then
    case ${2:-} in
      prometheus | triton) "where_$2" || exit 3 ;;
      *) die "usage: $0 where prometheus|triton" ;;
    esac
    return
  fi
  (($#)) || set -- prometheus triton
  local tool path
  for tool; do
    [[ $tool == prometheus || $tool == triton ]] || die "unknown tool '$tool'; known: prometheus, triton"
    if ! path=$("where_$tool"); then
      mkdir -p "$cache"
      exec 9>"$cache/.lock"
      flock 9 # a second run waits here, then finds it installed
      work=$(mktemp -d "$cache/.work.XXXXXX")
      trap 'rm -rf "$work"' EXIT
      "where_$tool" >/dev/null || "install_$tool"
      rm -rf "$work"
      exec 9>&-
      path=$("where_$tool") || die "$tool was installed but is not found"
    fi
    case $tool in
      prometheus) printf 'PROMETHEUS_BIN=%s\n' "$path" ;;
      triton) printf 'TRITON_HOME=%s\n' "$path" ;;
    esac
  done
}

main "$@"
