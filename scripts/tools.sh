#!/usr/bin/env bash
# Gets the real programs that the tests start; no root, nothing outside the cache, no service started.
#
#   scripts/tools.sh [NAME...]     install what is missing (default: all; containerd only as root); prints VARIABLE=PATH of each
#   scripts/tools.sh where NAME    print the path of an installed one; exit 3 when it is not installed
#
# NAME: prometheus  Debian's package, checked by apt's signatures; its path is the program's, the others' is a folder
#       triton      the tritonserver in NVIDIA's nvidia-pytriton wheel, pinned by hash below; runs without a GPU
#       etcd, containerd (with runc and busybox)   Debian's packages
#       cc          the machine's C compiler, else Debian's tcc; its path is the program's
#       kubernetes  kube-apiserver and its companions, built from the Go modules pinned in scripts/kubernetes
#       istio       pilot-discovery, istioctl and Istio's CRDs (crds.yaml), built from the Go module pinned below
# The Go builds take minutes and up to 3 GB of memory, once per version. Without Go, the default leaves them out.
#
# MESHCTL_CACHE       where they are kept, by version    (default ~/.cache/meshctl)
# PROMETHEUS_BIN      a Prometheus to use instead        (default: the one on PATH, then Debian's package)
# KUBEBUILDER_ASSETS  a folder whose etcd, kube-apiserver and kubectl are used instead
# PYTHON              the Python that Triton's models run in; needs numpy   (default: .venv's, then python3)
set -euo pipefail

readonly PYTRITON=nvidia-pytriton==0.7.0
readonly PYTRITON_SHA256=21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df # x86_64
readonly ISTIO=v0.0.0-20260827124520-eed52ebb66ad # Istio serves no release tag as a Go module

# What scripts/tools.sh prints, and the file in a tool's folder that shows that it is there.
declare -rA VARIABLE=([prometheus]=PROMETHEUS_BIN [triton]=TRITON_HOME [etcd]=ETCD_HOME [kubernetes]=KUBERNETES_HOME
  [istio]=ISTIO_HOME [containerd]=CONTAINERD_HOME [cc]=CC)
declare -rA PROOF=([prometheus]=usr/bin/prometheus [triton]=pytriton/tritonserver/bin/tritonserver [etcd]=etcd
  [kubernetes]=kube-apiserver [istio]=pilot-discovery [containerd]=containerd [cc]=cc)
readonly NAMES="prometheus triton etcd kubernetes istio containerd cc"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${MESHCTL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/meshctl}
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3) || python=

say() { printf 'tools: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

debian_release() { (. /etc/os-release 2>/dev/null && printf '%s%s' "${ID:-linux}" "${VERSION_ID:-}") || printf linux; }
# PYTHON's own version asked without starting it where possible: `where` runs often and must be quick.
python_version() { "$python" -S -E -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
kubernetes_version() { awk '$1 == "k8s.io/kubernetes" {print substr($2, 2); exit}' "$root/scripts/kubernetes/go.mod"; }

# The folder of an installed tool, there or not.
home_of() {
  case $1 in
    triton) printf '%s/triton-%s-py%s' "$cache" "${PYTRITON##*==}" "$(python_version)" ;;
    kubernetes) printf '%s/kubernetes-%s' "$cache" "$(kubernetes_version)" ;;
    istio) printf '%s/istio-%s' "$cache" "${ISTIO#v}" ;;
    *) printf '%s/%s-%s' "$cache" "$1" "$(debian_release)" ;;
  esac
}

where() {
  if [[ $1 == prometheus && -n ${PROMETHEUS_BIN:-} ]]; then
    [[ -x $PROMETHEUS_BIN ]] || die "PROMETHEUS_BIN=$PROMETHEUS_BIN is not an executable file"
    printf '%s\n' "$PROMETHEUS_BIN"
  elif [[ $1 == prometheus || $1 == cc ]] && command -v "$1"; then :
  elif [[ $1 == etcd && -x ${KUBEBUILDER_ASSETS:-}/etcd ]]; then
    printf '%s\n' "$KUBEBUILDER_ASSETS"
  elif [[ $1 == triton && -z $python ]]; then
    return 1
  else
    local home; home=$(home_of "$1")
    [[ -x $home/${PROOF[$1]} ]] || return 1
    if [[ $1 == prometheus || $1 == cc ]]; then home=$home/${PROOF[$1]}; fi
    printf '%s\n' "$home"
  fi
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

# debian_programs FOLDER PACKAGE FILE...: the files of a package, in the folder.
debian_programs() {
  local folder=$1 package=$2 file; shift 2
  (cd "$work" && apt_download "$package" && dpkg -x "$package"_*.deb "$package")
  mkdir -p "$folder"
  for file; do mv "$work/$package/$file" "$folder/"; done
}

# Each install_NAME fills the folder $1, which main then moves to its place whole.
install_prometheus() {
  (cd "$work" && apt_download prometheus && dpkg -x prometheus_*.deb "$1")
  "$1/usr/bin/prometheus" --version >/dev/null 2>&1 || die "Debian's prometheus does not run on this machine"
}

install_etcd() {
  debian_programs "$1" etcd-server usr/bin/etcd
  "$1/etcd" --version >/dev/null 2>&1 || die "Debian's etcd does not run on this machine"
}

install_containerd() {
  debian_programs "$1" containerd usr/bin/{containerd,containerd-shim-runc-v2,ctr}
  debian_programs "$1" runc usr/sbin/runc
  debian_programs "$1" busybox-static bin/busybox
  "$1/containerd" --version >/dev/null 2>&1 && "$1/runc" --version >/dev/null 2>&1 ||
    die "Debian's containerd or runc does not run on this machine"
}

install_cc() {
  (cd "$work" && apt_download tcc && dpkg -x tcc_*.deb "$1")
  printf '#!/bin/sh\nhome=$(dirname "$0")\nexec "$home/usr/bin/tcc" -B"$(echo "$home"/usr/lib/*/tcc)" "$@"\n' >"$1/cc"
  chmod +x "$1/cc"
  "$1/cc" -c -o "$work/stub.o" "$root/tests/harness/nvml/stub.c" >/dev/null 2>&1 || die "Debian's tcc does not run on this machine"
}

# go_builds COMMAND...: runs it in the background's priority; its output is shown when it fails.
go_builds() {
  command -v go >/dev/null || die "$tool is built from source: install Go (https://go.dev/dl), or leave the cluster tests out"
  say "building $tool takes some minutes, once"
  CGO_ENABLED=0 nice "$@" >"$work/build.log" 2>&1 || { tail -n 40 "$work/build.log" >&2; die "$tool could not be built: see above"; }
}

install_kubernetes() {
  local version flags=-s\ -w package
  version=$(kubernetes_version)
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    flags+=" -X $package.gitVersion=v$version -X $package.gitMajor=${version%%.*} -X $package.gitMinor=$(cut -d. -f2 <<<"$version")"
  done
  mkdir "$1"
  cd "$root/scripts/kubernetes"
  go_builds go build -trimpath -ldflags "$flags" -o "$1/" tool
  cd "$root"
}

install_istio() {
  local api
  GOBIN=$1 go_builds go install -trimpath -ldflags "-s -w" "istio.io/istio/pilot/cmd/pilot-discovery@$ISTIO" "istio.io/istio/istioctl/cmd/istioctl@$ISTIO"
  # The CRDs are those of the API that was built in.
  api=$(go version -m "$1/pilot-discovery" | awk '$1 == "dep" && $2 == "istio.io/api" {print $2 "@" $3}')
  cp "$(go env GOMODCACHE)/$api/kubernetes/customresourcedefinitions.gen.yaml" "$1/crds.yaml"
  chmod u+w "$1/crds.yaml"
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
  local version home=$1
  version=$(python_version)
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
}

known() { [[ " $NAMES " == *" $1 "* ]] || die "unknown tool '$1'; known: $NAMES"; }

install() {
  local tool=$1 home
  home=$(home_of "$tool")
  say "installing $tool into $home"
  "install_$tool" "$work/new"
  rm -rf "$home" && mv "$work/new" "$home"
}

main() {
  if [[ ${1:-} == where ]]; then
    known "${2:-}"
    where "$2" || exit 3
    return
  fi
  if (($# == 0)); then
    set -- prometheus triton etcd cc
    if command -v go >/dev/null; then
      set -- "$@" kubernetes istio
      if ((EUID == 0)); then set -- "$@" containerd; fi # without root, no kubelet runs
    else
      say "no Go here, so no Kubernetes and no Istio: the tests that need them are skipped (in CI they fail)"
    fi
  fi
  local tool path
  for tool; do
    known "$tool"
    if ! path=$(where "$tool"); then
      mkdir -p "$cache"
      exec 9>"$cache/.lock"
      flock 9 # a second run waits here, then finds it installed
      work=$(mktemp -d "$cache/.work.XXXXXX")
      trap 'rm -rf "$work"' EXIT
      where "$tool" >/dev/null || install "$tool"
      rm -rf "$work"
      exec 9>&-
      path=$(where "$tool") || die "$tool was installed but is not found"
    fi
    printf '%s=%s\n' "${VARIABLE[$tool]}" "$path"
  done
}

main "$@"
