//! What a kernel may leave out, say twice, or hide: each an alteration of a small machine with two
//! nodes of two CPUs, in the text form of `tests/support`.

use std::fs;
use std::io;
use std::path::PathBuf;

use pageferry_topology::{
    CpuId, CpuList, Id, IdList, Machine, NodeError, NodeId, ReadError, TierSource,
};
use tempfile::TempDir;

mod support;

fn tree(alterations: &str) -> TempDir {
    let root = support::unpack("small");
    support::lay(root.path(), alterations);
    root
}

fn odd(alterations: &str) -> Machine {
    match Machine::read_from(tree(alterations).path()) {
        Ok(machine) => machine,
        Err(error) => panic!("refused: {error}, of\n{alterations}"),
    }
}

fn refused(alterations: &str) -> ReadError {
    Machine::read_from(tree(alterations).path()).expect_err(alterations)
}

fn node(number: u32) -> NodeId {
    NodeId::new(number)
}

fn list<I: Id>(ids: impl IntoIterator<Item = I>) -> String {
    ids.into_iter().collect::<IdList<I>>().to_string()
}

fn groups(machine: &Machine) -> Vec<String> {
    machine.cache_groups().iter().map(CpuList::to_string).collect()
}

fn siblings(machine: &Machine, cpu: u32) -> String {
    machine.cpu(CpuId::new(cpu)).expect("online").siblings.to_string()
}

#[test]
fn emulated_nodes_share_their_cpus_and_are_all_near() {
    let machine = odd("\
sys/devices/system/node/node{0-1}/cpulist\t0-3
sys/devices/system/node/node{0-1}/distance\t10 10
");
    for id in [node(0), node(1)] {
        assert_eq!(list(machine.nearest_cpus(id).expect("online").iter()), "0-3");
        assert_eq!(machine.distance(node(0), id), Ok(10));
    }
    // The kernel's own choice for a CPU of several emulated nodes is the first.
    assert!(machine.cpus().iter().all(|cpu| cpu.node == Some(node(0))));
    assert_eq!(machine.tiers().len(), 1);
    assert_eq!(groups(&machine), ["0-1", "2-3"]);
}

#[test]
fn a_cache_without_level_or_kind_is_left_out() {
    for (what, values) in [("type", &["", "Unknown"][..]), ("level", &["", "0"])] {
        let path = format!("sys/devices/system/cpu/cpu0/cache/index3/{what}");
        let written = values.iter().map(|value| format!("{path}\t{value}\n"));
        for alteration in written.chain([format!("-{path}\n")]) {
            let machine = odd(&alteration);
            let levels: Vec<u32> = machine.cpus()[0].caches.iter().map(|c| c.level).collect();
            assert_eq!(levels, [1], "{alteration}");
            assert_eq!(machine.cpus()[1].caches.len(), 2, "{alteration}");
        }
    }
}

#[test]
fn a_cache_without_size_is_of_unknown_size() {
    let path = "sys/devices/system/cpu/cpu0/cache/index3/size";
    for alteration in [format!("-{path}\n"), format!("{path}\t\n"), format!("{path}\t0K\n")] {
        let machine = odd(&alteration);
        let cache = machine.cpus()[0].last_level_cache().expect("an L3");
        assert_eq!((cache.level, cache.size_bytes), (3, None), "{alteration}");
        assert_eq!(list(cache.shared_by.iter()), "0-1", "{alteration}");
    }
}

#[test]
fn a_cache_that_says_by_mask_who_shares_it_is_read_from_the_mask() {
    for first in ["3", "00000003", "00000000,00000003"] {
        let machine = odd(&format!(
            "\
-sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_list
sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_map\t{first}
sys/devices/system/cpu/cpu2/cache/index3/shared_cpu_list\t
sys/devices/system/cpu/cpu2/cache/index3/shared_cpu_map\tc
"
        ));
        assert_eq!(groups(&machine), ["0-1", "2-3"], "{first}");
    }
}

#[test]
fn a_mask_that_is_none_is_refused_with_the_word() {
    for (mask, word) in
        [("3,", "``"), ("0x3", "`0x3`"), ("123456789", "`123456789`"), ("+3", "`+3`")]
    {
        let path = "sys/devices/system/cpu/cpu0/cache/index3/shared_cpu";
        let error = refused(&format!("-{path}_list\n{path}_map\t{mask}\n")).to_string();
        assert!(error.contains("shared_cpu_map") && error.contains(word), "{error}");
    }
}

#[test]
fn cpus_whose_sharing_is_not_told_are_grouped_by_package() {
    let alteration = "-sys/devices/system/cpu/cpu1/cache/index3/shared_cpu_list\n\
                      -sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_list\n";
    let machine = odd(alteration);
    let cache = machine.cpus()[1].last_level_cache().expect("it is told of");
    assert!(cache.shared_by.is_empty());
    assert_eq!(cache.size_bytes, Some(1 << 20));
    assert_eq!(groups(&machine), ["0-1", "2-3"]);
}

#[test]
fn nodes_that_may_not_be_listed_are_an_error_and_never_one_node() {
    // A directory, or a link to itself, answers with another errno than "no such file", to root too.
    let online = "sys/devices/system/node/online";
    for (alteration, named) in [
        (format!("-{online}\n{online}/\t\n"), online),
        (format!("-{online}\n"), online),
        ("-sys/devices/system/node\nsys/devices/system/node\t\n".to_owned(), online),
        ("-sys/devices/system/node/node1/meminfo\n".to_owned(), "node1/meminfo"),
        ("-sys/devices/system/node/node1/distance\n".to_owned(), "node1/distance"),
        ("-sys/devices/system/node/node1/cpulist\n".to_owned(), "node1/cpulist"),
        ("-sys/devices/system/cpu/online\n".to_owned(), "sys/devices/system/cpu/online"),
    ] {
        let alteration = format!("proc/meminfo\tMemTotal: 9 kB\\nMemFree: 1 kB\n{alteration}");
        let error = refused(&alteration);
        assert!(matches!(&error, ReadError::Io { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
        assert!(error.to_string().contains(error.remedy()), "{error}");
    }
}

#[test]
fn only_a_missing_directory_means_that_the_kernel_has_no_nodes() {
    let machine = odd("proc/meminfo\tMemTotal: 9 kB\\nMemFree: 1 kB\n-sys/devices/system/node\n");
    assert_eq!(machine.nodes().len(), 1);
    assert_eq!(machine.nodes()[0].memory_bytes, 9 << 10);
    assert_eq!(list(machine.nodes()[0].cpus.iter()), "0-3");
}

#[test]
fn the_remedy_fits_the_reason() {
    let error = |number| ReadError::Io {
        path: PathBuf::from("/sys/devices/system/node/online"),
        source: io::Error::from_raw_os_error(number),
    };
    for (number, word) in [
        (libc::ENOENT, "mount"),
        (libc::EACCES, "sandbox"),
        (libc::EPERM, "sandbox"),
        (libc::EMFILE, "ulimit -n"),
        (libc::EIO, "report"),
    ] {
        assert!(error(number).remedy().contains(word), "{}", error(number));
    }
}

#[test]
fn a_node_list_that_may_not_be_read_asks_for_the_right_to() {
    use std::os::unix::fs::PermissionsExt as _;
    let root = tree("");
    let online = root.path().join("sys/devices/system/node/online");
    fs::set_permissions(&online, fs::Permissions::from_mode(0o000)).expect("it is ours");
    if fs::read(&online).is_ok() {
        eprintln!("skipped: this user may read every file");
        return;
    }
    let error = Machine::read_from(root.path()).expect_err("it may not be read");
    assert!(error.to_string().contains("sandbox"), "{error}");
}

#[test]
fn zero_is_not_a_speed_and_hides_none() {
    let class = |class: u32, values: [u32; 4]| {
        let at = format!("sys/devices/system/node/node0/access{class}/initiators");
        let names = ["read_bandwidth", "write_bandwidth", "read_latency", "write_latency"];
        let lines = names.iter().zip(values).map(|(name, value)| format!("{at}/{name}\t{value}\n"));
        lines.chain([format!("{at}/node1/\t\n")]).collect::<String>()
    };
    let machine = odd(&(class(1, [0; 4]) + &class(0, [1000, 0, 0, 120])));
    let access = machine.nodes()[0].access.as_ref().expect("class 0 tells");
    assert_eq!((access.read_mib_per_s, access.write_mib_per_s), (Some(1000), None));
    assert_eq!((access.read_latency_ns, access.write_latency_ns), (None, Some(120)));
    assert_eq!(list(access.initiators.iter()), "1");
    assert_eq!(odd(&(class(1, [0; 4]) + &class(0, [0; 4]))).nodes()[0].access, None);
    let machine = odd(&(class(1, [0, 900, 0, 0]) + &class(0, [1000; 4])));
    let access = machine.nodes()[0].access.as_ref().expect("class 1 tells");
    assert_eq!((access.read_mib_per_s, access.write_mib_per_s), (None, Some(900)));
}

#[test]
fn an_offline_cpu_is_in_no_set() {
    let machine = odd("\
sys/devices/system/cpu/online\t0,2-3
sys/devices/system/cpu/cpu{2-3}/topology/core_cpus_list\t1-3
");
    assert_eq!(list(machine.nearest_cpus(node(0)).expect("online").iter()), "0");
    assert_eq!(list(machine.cpus()[0].caches[1].shared_by.iter()), "0");
    assert_eq!(siblings(&machine, 2), "2-3");
    assert_eq!(groups(&machine), ["0", "2-3"]);
}

#[test]
fn a_node_whose_cpus_are_all_offline_is_served_by_the_nearest() {
    let machine = odd("sys/devices/system/cpu/online\t2-3\n");
    assert!(machine.nodes()[0].is_cpuless());
    assert_eq!(list(machine.nearest_cpus(node(0)).expect("online").iter()), "2-3");
}

#[test]
fn a_node_without_its_directory_is_not_there_and_takes_no_distance() {
    let machine = odd("\
sys/devices/system/node/online\t0-2
sys/devices/system/node/possible\t0-3
sys/devices/system/node/node2/cpulist\t
sys/devices/system/node/node2/meminfo\tNode 2 MemTotal: 64 kB\\nNode 2 MemFree: 64 kB
sys/devices/system/node/node0/distance\t10 99 17
sys/devices/system/node/node2/distance\t17 99 10
sys/devices/system/node/node0/access1/initiators/node{0-1}/\t
sys/devices/system/node/node0/access1/initiators/read_latency\t100
-sys/devices/system/node/node1
");
    assert_eq!(list(machine.nodes().iter().map(|n| n.id)), "0,2");
    assert_eq!(machine.distance(node(0), node(2)), Ok(17));
    assert_eq!(list(machine.nodes()[0].distances.keys().copied()), "0,2");
    assert_eq!(machine.offline_nodes().to_string(), "1,3");
    assert!(matches!(machine.memory_node(node(1)), Err(NodeError::Offline { .. })));
    let access = machine.nodes()[0].access.as_ref().expect("told");
    assert_eq!(list(access.initiators.iter()), "0");
    // CPUs 2 and 3 are online all the same.
    assert_eq!(machine.cpu(CpuId::new(2)).expect("online").node, None);
}

#[test]
fn a_machine_without_any_node_directory_is_refused() {
    let error = refused("-sys/devices/system/node/node0\n-sys/devices/system/node/node1\n");
    assert!(error.to_string().contains("node0/meminfo"), "{error}");
}

#[test]
fn an_empty_or_missing_sibling_list_falls_back_to_what_else_there_is() {
    let core = "sys/devices/system/cpu/cpu0/topology/core_cpus";
    let thread = "sys/devices/system/cpu/cpu0/topology/thread_siblings";
    for (alteration, expected) in [
        (format!("{core}_list\t\n{thread}_list\t0,2\n"), "0,2"),
        (format!("-{core}_list\n{thread}_list\t0,2\n"), "0,2"),
        (format!("-{core}_list\n{core}\t5\n"), "0,2"),
        (format!("{core}_list\t\n{core}\t5\n{thread}_list\t0,3\n"), "0,2"),
        (format!("-{core}_list\n-{thread}_list\n{thread}\t00000009\n"), "0,3"),
        (format!("-{core}_list\n-{thread}_list\n"), "0"),
        (format!("{core}_list\t\n{thread}_list\t\n"), "0"),
        (format!("{core}_list\t1\n"), "0-1"),
        ("-sys/devices/system/cpu/cpu0/topology\n".to_owned(), "0"),
    ] {
        assert_eq!(siblings(&odd(&alteration), 0), expected, "{alteration}");
    }
}

#[test]
fn cpus_of_which_only_the_numbers_are_told_are_known_by_number() {
    let machine = odd("\
-sys/devices/system/cpu/cpu0
-sys/devices/system/cpu/cpu1
-sys/devices/system/cpu/cpu2
-sys/devices/system/cpu/cpu3
");
    assert_eq!(list(machine.cpus().iter().map(|cpu| cpu.id)), "0-3");
    assert!(machine.cpus().iter().all(|cpu| cpu.caches.is_empty() && cpu.package.is_none()));
    assert_eq!(groups(&machine), ["0-3"]);
}

#[test]
fn a_nodes_cpus_are_read_from_its_mask_where_the_list_is_missing_or_cut_off() {
    let mask = "sys/devices/system/node/node1/cpumap\t00000000,0000000c\n";
    let machine = odd(&format!("{mask}-sys/devices/system/node/node1/cpulist\n"));
    assert_eq!(list(machine.nodes()[1].cpus.iter()), "2-3");

    // A page, cut within a number: 1234 became 123.
    let root = tree(mask);
    let cut = format!("0,{}", "1234,".repeat(1000))[..4095].to_owned();
    assert!(cut.ends_with(",123"));
    support::write(root.path(), "sys/devices/system/node/node1/cpulist", &cut);
    let machine = Machine::read_from(root.path()).expect("the mask tells");
    assert_eq!(list(machine.nodes()[1].cpus.iter()), "2-3");

    fs::remove_file(root.path().join("sys/devices/system/node/node1/cpumap")).expect("it was");
    let error = Machine::read_from(root.path()).expect_err("nothing whole is left");
    assert!(error.to_string().contains("cut off"), "{error}");
}

#[test]
fn numbering_may_have_gaps_and_begin_anywhere() {
    let machine = odd("\
sys/devices/system/node/online\t3,700
-sys/devices/system/node/node0
-sys/devices/system/node/node1
sys/devices/system/node/node3/cpulist\t5
sys/devices/system/node/node700/cpulist\t900
sys/devices/system/node/node{3,700}/meminfo\tMemTotal: 64 kB\\nMemFree: 64 kB
# The kernel begins with a blank where node 0 is not online.
sys/devices/system/node/node3/distance\t 10 30
sys/devices/system/node/node700/distance\t 40 10
sys/devices/system/cpu/online\t5,900
");
    assert_eq!(machine.distance(node(3), node(700)), Ok(30));
    assert_eq!(machine.distance(node(700), node(3)), Ok(40));
    assert_eq!(list(machine.cpus().iter().map(|cpu| cpu.id)), "5,900");
}

#[test]
fn a_tier_may_be_empty_or_without_nodes_and_a_node_in_two_belongs_to_the_faster() {
    let tier = "sys/devices/virtual/memory_tiering/memory_tier";
    let machine = odd(&format!(
        "\
{tier}3/\t
{tier}4/nodelist\t0
{tier}5/nodelist\t
{tier}7/nodelist\t0-1,9
{tier}8/nodelist\t1
{tier}x/nodelist\t1
"
    ));
    assert_eq!(machine.tier_source(), TierSource::Kernel);
    let tiers: Vec<(u32, String)> =
        machine.tiers().iter().map(|tier| (tier.id.get(), tier.nodes.to_string())).collect();
    assert_eq!(tiers, [(4, "0".to_owned()), (7, "1".to_owned())]);
}

#[test]
fn what_is_optional_may_answer_with_any_errno_or_nothing() {
    // A file where a directory is expected, and the reverse, are errnos that root gets, too.
    let cpu = "sys/devices/system/cpu/cpu0";
    for alteration in [
        format!("-{cpu}/cache\n{cpu}/cache\t\n"),
        format!("-{cpu}/topology\n{cpu}/topology\t\n"),
        format!("-{cpu}/cache/index3/size\n{cpu}/cache/index3/size/\t\n"),
        format!("{cpu}/topology/core_id\t\n{cpu}/topology/physical_package_id\t\n"),
        "sys/devices/virtual/memory_tiering\t\n".to_owned(),
        "sys/devices/virtual/memory_tiering/memory_tier4/nodelist/\t\n".to_owned(),
        "sys/kernel/mm/hugepages\t\n".to_owned(),
        "sys/devices/system/node/node0/access1\t\n".to_owned(),
        "sys/devices/system/node/node0/access1/initiators/read_latency\t\n".to_owned(),
        "-sys/devices/system/node/possible\n".to_owned(),
        "sys/devices/system/node/possible\t\n".to_owned(),
        "-proc/cpuinfo\nproc/cpuinfo/\t\n".to_owned(),
        "sys/kernel/mm/transparent_hugepage/hpage_pmd_size\t\n".to_owned(),
        "sys/kernel/mm/transparent_hugepage/hpage_pmd_size\t0\n".to_owned(),
    ] {
        let machine = odd(&alteration);
        assert_eq!((machine.nodes().len(), machine.cpus().len()), (2, 4), "{alteration}");
        assert!(machine.pages().base_bytes.is_power_of_two(), "{alteration}");
        assert!(machine.pages().thp_bytes != Some(0), "{alteration}");
    }
}

#[test]
fn bytes_that_are_no_text_are_named_as_content() {
    let root = tree("");
    let distance = root.path().join("sys/devices/system/node/node0/distance");
    fs::write(distance, b"10 \xff\xfe\n").expect("writable");
    let error = Machine::read_from(root.path()).expect_err("no distances");
    assert!(matches!(error, ReadError::Malformed { .. }), "{error}");
    fs::write(root.path().join("sys/devices/system/node/node0/distance"), "10 20\n")
        .expect("again");
    fs::write(root.path().join("proc/cpuinfo"), b"model name : \xff CPU\n").expect("writable");
    let machine = Machine::read_from(root.path()).expect("a name may be odd");
    assert_eq!(machine.cpu_model(), Some("\u{fffd} CPU"));
}

#[test]
fn every_architecture_has_a_name_for_its_cpu() {
    for (text, name) in [
        ("model name\t: AMD EPYC 9654\\ncpu MHz\t: 2400", Some("AMD EPYC 9654")),
        ("CPU implementer : 0x41\\nCPU part : 0xd4f", Some("Arm implementer 0x41 part 0xd4f")),
        (
            "processor : 0\\ncpu : POWER9, altivec supported\\nmodel : 8335-GTH\\nmachine : PowerNV",
            Some("POWER9, altivec supported"),
        ),
        (
            "vendor_id : IBM/S390\\n# processors : 2\\n\
             processor 0: version = FF,  identification = 0133E8,  machine = 3931",
            Some("IBM/S390 machine 3931"),
        ),
        ("hart : 1\\nisa : rv64imafdc\\nuarch : sifive,u74-mc", Some("sifive,u74-mc")),
        ("hart : 1\\nisa : rv64imafdch_zicbom_zicsr\\nmmu : sv48", Some("RISC-V rv64imafdch")),
        ("CPU Family : Loongson-64bit\\nModel Name : Loongson-3A5000", Some("Loongson-3A5000")),
        ("system type : x\\ncpu model : ICT Loongson-3 V0.4", Some("ICT Loongson-3 V0.4")),
        ("model name :\\ncpu : sun4v", Some("sun4v")),
        ("processor : 0\\nvendor_id : Nobody", None),
        ("", None),
    ] {
        let root = support::unpack("small");
        support::write(root.path(), "proc/cpuinfo", &text.replace("\\n", "\n"));
        let machine = Machine::read_from(root.path()).expect("readable");
        assert_eq!(machine.cpu_model(), name, "{text}");
    }
}

#[test]
fn a_tree_of_another_architecture_tells_its_base_page() {
    for (pmd, base) in [(1 << 20, 4096), (2 << 20, 4096), (32 << 20, 16384), (512 << 20, 65536)] {
        let path = "sys/kernel/mm/transparent_hugepage/hpage_pmd_size";
        assert_eq!(odd(&format!("{path}\t{pmd}\n")).pages().base_bytes, base);
    }
}
