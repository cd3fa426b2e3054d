//! sqlite3: the same script with moves and without prints the same.

use super::run::Run;
use anyhow::{Context as _, bail};
use std::fs::File;
use std::time::Instant;

const SCRIPT: &str = "
create table t(a integer primary key, b text, c blob);
create index i on t(b);
with recursive n(x) as (select 1 union all select x + 1 from n where x < 60000)
    insert into t select x, 'row ' || (x * 7919 % 60000), zeroblob(x % 300) from n;
create virtual table f using fts5(b);
insert into f select b || ' word' || (a % 1000) from t;
insert into f(f) values('integrity-check');
select count(*), sum(length(c)), sum(a * length(b)) from t;
select count(*), min(rowid), max(rowid) from f where f match 'word77 OR word9*';
delete from t where a % 3 = 0;
update t set c = zeroblob(500) where a % 5 = 0;
vacuum;
select b, a from t order by b limit 5 offset 1000;
select sum(x * y) from (select a x, lag(a, 1, 0) over (order by b, a) y from t);
pragma integrity_check;
";

pub(crate) fn run(run: &Run) -> anyhow::Result<()> {
    std::fs::write(run.folder.join("script.sql"), SCRIPT)?;
    let mut reference = None;
    let started = Instant::now();
    while reference.is_none() || started.elapsed() < run.share {
        for database in [":memory:", "data.db"] {
            let _ = std::fs::remove_file(run.folder.join("data.db"));
            let mut command = if reference.is_none() {
                run.command("sqlite3")?
            } else {
                run.tortured("sqlite3")?
            };
            command.arg("-bail").arg(database).stdin(File::open(run.folder.join("script.sql"))?);
            let printed = run.finish(command, "sqlite3")?;
            let expected: &String = reference.get_or_insert_with(|| printed.clone());
            if !printed.trim_end().ends_with("ok") || printed != *expected {
                bail!("sqlite3 printed\n{printed}instead of\n{expected}");
            }
        }
    }
    reference.map(drop).context("nothing was run")
}
