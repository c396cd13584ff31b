#!/usr/bin/env bash
# Certificates for the extender and for the schedulers that may ask it, from an authority made for them.
#
#   deploy/extender/certificates.sh              writes the Secrets meshctl-extender-server and -client to the cluster
#   deploy/extender/certificates.sh DIRECTORY    writes their files there: server/ and client/, each with tls.crt, tls.key, ca.crt
#
# Nobody keeps the authority's key: to renew, run it again, and then
#   kubectl rollout restart -n meshctl-system deployment/meshctl-extender deployment/meshctl-scheduler
#
# NAMESPACE   where the extender runs (default meshctl-system)
# DAYS        how long they are valid (default 730)
# KUBECTL     (default kubectl)
set -euo pipefail
umask 077

namespace=${NAMESPACE:-meshctl-system}
days=${DAYS:-730}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${1:-$work/out}
key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256)

# Openssl says what it did on stderr; it is shown when something fails.
quietly() { "$@" 2>"$work/log" || { cat "$work/log" >&2; return 1; }; }

# issue DIRECTORY COMMON_NAME EXTENSIONS
issue() {
  mkdir -p "$out/$1"
  quietly openssl req -new "${key[@]}" -subj "/CN=$2" -keyout "$out/$1/tls.key" -out "$work/$1.csr"
  printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n%s\n' "$3" >"$work/$1.ext"
  quietly openssl x509 -req -sha256 -days "$days" -in "$work/$1.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/$1.ext" -out "$out/$1/tls.crt"
  cp "$work/ca.crt" "$out/$1/ca.crt"
}

# secret DIRECTORY: as the API server wants it, from its files
secret() {
  "${KUBECTL:-kubectl}" create secret generic "meshctl-extender-$1" --namespace "$namespace" --type kubernetes.io/tls \
    --from-file "$out/$1" --dry-run=client --output yaml
}

printf '[req]\ndistinguished_name=name\n[name]\n[authority]\n%s\n%s\n%s\n' basicConstraints=critical,CA:TRUE \
  keyUsage=critical,keyCertSign subjectKeyIdentifier=hash >"$work/ca.cnf"
quietly openssl req -x509 "${key[@]}" -config "$work/ca.cnf" -extensions authority -days "$days" \
  -subj "/CN=meshctl-extender-authority" -keyout "$work/ca.key" -out "$work/ca.crt"
service=meshctl-extender.$namespace.svc
issue server "$service" $'extendedKeyUsage=serverAuth\nsubjectAltName=DNS:'"$service,DNS:$service.cluster.local"
issue client meshctl-scheduler extendedKeyUsage=clientAuth

if (($# == 0)); then
  secret server | "${KUBECTL:-kubectl}" apply --server-side --force-conflicts --filename -
  secret client | "${KUBECTL:-kubectl}" apply --server-side --force-conflicts --filename -
fi
