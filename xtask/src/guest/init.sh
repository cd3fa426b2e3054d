#!/bin/busybox sh
# The first process of a guest. It sets the machine up, does what the kernel's command line asks
# for (guest=test, shell, bench, compare, cost or probe) and turns the machine off. What the host reads goes to the
# virtio port named "results": tests' output as it is, and records, each on a line that begins
# with an ASCII RS (see record.rs).

/bin/busybox mkdir -p /proc /sys /dev /tmp /root /run
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=linux

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts /dev/hugepages
for at in /tmp /root /run /dev/shm; do mount -t tmpfs tmp $at; done
chmod 1777 /tmp /dev/shm
mount -t devpts pts /dev/pts
mount -t hugetlbfs huge /dev/hugepages
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
ln -sf /proc/self/fd /dev/fd
ip link set lo up 2>/dev/null

# Control groups: version 2, with every controller for the groups below the root.
mount -t cgroup2 cgroup /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done

# The first group makes Linux patch its code where it looks for cpusets, which an emulated CPU that is
# there at that moment does not always survive: now nobody is.
mkdir /sys/fs/cgroup/first

mode=test hugetlb=0 seconds=100
for word in $(cat /proc/cmdline); do
    case $word in
        guest=*) mode=${word#guest=} ;;
        guest.hugetlb=*) hugetlb=${word#*=} ;;
        guest.seconds=*) seconds=${word#*=} ;;
    esac
done

# Swap in compressed memory; huge pages where a program asks for them; some for hugetlb.
for module in /modules/*.ko; do insmod "$module"; done
echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0
echo madvise >/sys/kernel/mm/transparent_hugepage/enabled
echo madvise >/sys/kernel/mm/transparent_hugepage/defrag
for pages in /sys/devices/system/node/node*/hugepages/hugepages-2048kB/nr_hugepages; do
    echo "$hugetlb" >"$pages"
done

for port in /sys/class/virtio-ports/*; do
    [ -e "$port" ] && [ "$(cat "$port/name")" = results ] && results=/dev/${port##*/}
done
# A machine without virtio has a second serial port.
if [ -z "$results" ]; then
    results=/dev/ttyPS1
    stty -F "$results" raw -echo
fi

# Tests compiled on the host know their scratch folder by its name there.
while read -r folder; do mkdir -p "$folder"; done </guest/folders
export PAGEFERRY_GUEST=1 CARGO_BIN_EXE_pageferry=/bin/pageferry
cd /tmp || exit

printf '\036ready %s\n' "$(uname -r)" >"$results"
case $mode in
shell)
    setsid cttyhack sh
    ;;
bench)
    pageferry bench --smoke --quiet >"$results" 2>&1
    printf '\036end bench smoke %s\n\036over\n' $? >"$results"
    ;;
cost)
    /tests/migration_cost >"$results" 2>&1
    printf '\036end bench cost %s\n\036over\n' $? >"$results"
    ;;
compare)
    /tests/beside_migrate_pages 2048 2 >"$results" 2>&1
    printf '\036end bench compare %s\n\036over\n' $? >"$results"
    ;;
test)
    exec 3>"$results"
    # What no kernel says while all is well with it: a test that has it say so has failed. (Stalls and
    # lockups are left out: where the host is busy, they say that an emulated CPU had to wait.)
    complaints() {
        dmesg | grep -E -e 'WARNING: |BUG: (KASAN|sleeping|Bad|scheduling|using|kernel|unable)' \
            -e 'kernel BUG|DMA-API: |list_(add|del) corruption|INFO: (possible|trying)'
    }
    heard=$(complaints | wc -l)
    # Each test in a process of its own: one that dies or hangs takes no other along.
    while read -r binary test; do
        printf '\036begin %s %s\n' "$binary" "$test" >&3
        timeout -s ABRT "$seconds" "/tests/$binary" --exact "$test" --nocapture \
            >&3 2>&3 3>&- </dev/null
        status=$?
        now=$(complaints | wc -l)
        if [ "$now" -gt "$heard" ]; then
            echo "the kernel complained:" >&3
            complaints | tail -n $((now - heard)) >&3
            dmesg | tail -n 200 >&3
            status=1
        fi
        heard=$now
        printf '\036end %s %s %s\n' "$binary" "$test" $status >&3
    done </guest/plan
    printf '\036over\n' >&3
    ;;
*) ;; # Up, and down again.
esac
poweroff -f
