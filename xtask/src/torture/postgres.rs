//! postgres: pgbench's accounts balance, and every table and index is as it should be.

use super::run::{Run, has};
use crate::needs;
use anyhow::ensure;
use std::process::Command;

const BALANCED: &str = "select (select sum(abalance) from pgbench_accounts) = s and \
    (select sum(tbalance) from pgbench_tellers) = s and (select sum(bbalance) from \
    pgbench_branches) = s and n > 0 from (select sum(delta) s, count(*) n from pgbench_history) h";

pub(crate) fn run(run: &Run) -> anyhow::Result<()> {
    let mut initdb = as_user(run, "initdb", false)?;
    initdb.args(["-D", "data", "-A", "trust", "-U", "torture", "-N", "--data-checksums"]);
    run.finish(initdb, "initdb")?;
    let mut server = as_user(run, "postgres", true)?;
    server.args(["-D", "data", "-h", "", "-k"]).arg(&run.folder);
    for setting in ["fsync=off", "work_mem=16MB", "shared_buffers=32MB"] {
        server.args(["-c", setting]);
    }
    let mut server = run.start(server, "postgres")?;
    server.until("answer", |run| {
        Ok(has(&run.folder, ".s.PGSQL.5432")
            && client(run, "pg_isready")?.output().is_ok_and(|out| out.status.success()))
    })?;
    server.check()?;
    let each = |program: &str, args: &[&str], name: &str| {
        let mut command = client(run, program)?;
        command.args(args);
        run.finish(command, name)
    };
    each("createdb", &["bench"], "createdb")?;
    each("pgbench", &["-i", "-q", "-s", "5", "bench"], "pgbench-init")?;
    let seconds = run.share.as_secs().max(2).to_string();
    each("pgbench", &["-c", "4", "-j", "2", "-T", &seconds, "bench"], "pgbench")?;
    // A sort and a hash join, whose memory is a backend's own.
    let sorted = "select count(*) from (select a.aid, b.abalance from pgbench_accounts a join \
        pgbench_accounts b on a.aid = 500001 - b.aid order by b.filler, a.aid desc) x";
    let counted = each("psql", &["-At", "-d", "bench", "-c", sorted], "psql-sort")?;
    ensure!(counted.trim() == "500000", "a sort of a join counted {counted}");
    let balanced = each("psql", &["-At", "-d", "bench", "-c", BALANCED], "psql")?;
    ensure!(balanced.trim() == "t", "pgbench's balances differ: {balanced}");
    each("pg_amcheck", &["--install-missing", "--heapallindexed", "bench"], "pg_amcheck")?;
    server.check()?;
    let status = server.end(libc::SIGINT)?;
    ensure!(status.success(), "postgres: {status}");
    Ok(())
}

/// A client. It is not moved: it does not compute.
fn client(run: &Run, program: &str) -> anyhow::Result<Command> {
    let mut command = run.command(program)?;
    command.env("PGHOST", &run.folder).env("PGUSER", "torture").env("PGDATABASE", "postgres");
    Ok(command)
}

/// postgres does not run as root. As another user it keeps the one right that the engine needs.
fn as_user(run: &Run, program: &str, tortured: bool) -> anyhow::Result<Command> {
    let of = |name: &str| if tortured { run.tortured(name) } else { run.command(name) };
    if !needs::is_root() {
        return of(program);
    }
    let file = super::run::find(program).unwrap_or_else(|| program.into());
    let mut command = of("setpriv")?;
    command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]);
    command.args(["--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]).arg(file);
    Ok(command)
}
