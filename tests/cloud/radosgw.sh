#!/usr/bin/env bash
# Run a command with the environment of a one-node Ceph whose S3 gateway listens on loopback:
#     tests/cloud/radosgw.sh pytest tests/cloud/test_store.py
# Its data are in memory; it ends with the command. Packages of Debian that are missing are installed, which needs root:
#     tests/cloud/radosgw.sh --install
# does only that, and fails with the reason in one line.
set -euo pipefail
if ! { command -v radosgw && command -v ceph-mon && command -v ceph-osd && command -v ceph-mgr; } >/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "no radosgw, and no root to install it"; exit 1; }
    { apt-get -qq update && apt-get -qq -y install radosgw ceph-mon ceph-osd ceph-mgr curl; } >/dev/null 2>&1 ||
        { echo "no radosgw: apt-get cannot install radosgw, ceph-mon, ceph-osd and ceph-mgr"; exit 1; }
fi
[ "$1" != --install ] || exit 0
dir=$(mktemp -d /tmp/radosgw-XXXXXX)
port=${RADOSGW_PORT:-8017} monitor=${RADOSGW_MONITOR_PORT:-13317}
config=(-c "$dir/ceph.conf")

stop() {
    for file in "$dir"/*.pid; do
        [ -e "$file" ] && kill "$(cat "$file")" 2>/dev/null
    done
    sleep 1
    rm -rf "$dir"
}
trap stop EXIT

mkdir "$dir"/{mon,mgr,osd,rgw}
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$monitor,v1:127.0.0.1:$((monitor + 1))]
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = $dir/keyring
run dir = $dir
log file = $dir/\$name.log
admin socket = $dir/\$name.asok
pid file = $dir/\$name.pid
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd
rgw data = $dir/rgw
osd objectstore = memstore
memstore device bytes = 2147483648
osd max object name len = 256
osd class load list = *
osd class default list = *
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon warn on pool no redundancy = false
rgw frontends = beast endpoint=127.0.0.1:$port
CONF
monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$monitor,v1:127.0.0.1:$((monitor + 1))]" "$dir/monmap" >/dev/null
ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
for name in client.admin client.rgw mgr.x osd.0; do
    ceph-authtool "$dir/keyring" --gen-key -n "$name" \
        --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' --cap mds 'allow *' >/dev/null
done
ceph-mon "${config[@]}" -i a --mkfs --monmap "$dir/monmap" --keyring "$dir/keyring" >/dev/null
ceph-mon "${config[@]}" -i a >/dev/null
ceph-mgr "${config[@]}" -i x >/dev/null 2>&1 || true
osd=$(cat /proc/sys/kernel/random/uuid)
ceph "${config[@]}" osd new "$osd" >/dev/null
ceph-osd "${config[@]}" -i 0 --mkfs --osd-uuid "$osd" >/dev/null 2>&1 || true
ceph-osd "${config[@]}" -i 0 >/dev/null 2>&1
radosgw "${config[@]}" -n client.rgw --pid-file="$dir/rgw.pid" >/dev/null 2>&1
for _ in $(seq 60); do
    curl -s "http://127.0.0.1:$port" >/dev/null 2>&1 && break
    sleep 1
done
radosgw-admin "${config[@]}" user create --uid=tests --display-name=tests \
    --access-key=quarkconv --secret-key=quarkconvsecret >/dev/null

export AWS_ENDPOINT_URL="http://127.0.0.1:$port" AWS_ACCESS_KEY_ID=quarkconv AWS_SECRET_ACCESS_KEY=quarkconvsecret
export AWS_REGION=us-east-1 AWS_ALLOW_HTTP=true RADOSGW="http://127.0.0.1:$port"
"$@"
