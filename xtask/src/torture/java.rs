//! A Java program that allocates, keeps and verifies, with each of the collectors.

use super::run::Run;
use anyhow::ensure;

const COLLECTORS: [&str; 5] = ["Serial", "Parallel", "G1", "Shenandoah", "Z"];
const SOURCE: &str = r#"
import java.util.*;
import java.util.zip.CRC32;

public class Check {
    static final class Item {
        final long seed; final byte[] data; final long sum; Item next;
        Item(long seed, Item next) {
            this.seed = seed; this.next = next;
            data = new byte[16 + (int) (seed % 4096)];
            new Random(seed).nextBytes(data);
            sum = sum(data);
        }
        static long sum(byte[] d) { CRC32 c = new CRC32(); c.update(d); return c.getValue(); }
        boolean good() {
            byte[] again = new byte[data.length];
            new Random(seed).nextBytes(again);
            return sum(data) == sum && Arrays.equals(data, again);
        }
    }
    public static void main(String[] args) throws Exception {
        long end = System.nanoTime() + Long.parseLong(args[0]) * 1_000_000L;
        Thread[] threads = new Thread[3];
        long[] checked = new long[threads.length];
        List<Throwable> wrong = Collections.synchronizedList(new ArrayList<>());
        for (int t = 0; t < threads.length; t++) {
            int me = t;
            threads[t] = new Thread(() -> {
                try {
                    Random random = new Random(me);
                    Item[] table = new Item[4096];
                    do {
                        for (int n = 0; n < 5000; n++) {
                            int at = random.nextInt(table.length);
                            Item old = table[at];
                            if (old != null) {
                                if (!old.good() || old.next != null && !old.next.good())
                                    throw new IllegalStateException("wrong bytes at " + at);
                                checked[me]++;
                                old.next = null;
                            }
                            table[at] = new Item(random.nextInt(1 << 30), old);
                        }
                    } while (System.nanoTime() < end);
                } catch (Throwable e) { wrong.add(e); }
            });
            threads[t].start();
        }
        for (Thread thread : threads) thread.join();
        if (!wrong.isEmpty()) { wrong.get(0).printStackTrace(); System.exit(1); }
        System.out.println("checked " + (Arrays.stream(checked).min().getAsLong() > 0));
    }
}
"#;

pub(crate) fn run(run: &Run) -> anyhow::Result<()> {
    std::fs::write(run.folder.join("Check.java"), SOURCE)?;
    let mut compiler = run.command("javac")?;
    compiler.arg("Check.java");
    run.finish(compiler, "javac")?;
    let each = run.share / u32::try_from(COLLECTORS.len()).unwrap_or(1);
    let mut failed = Vec::new();
    for collector in COLLECTORS {
        let option = format!("-XX:+Use{collector}GC");
        // A build may lack a collector.
        if run
            .command("java")?
            .args([&option, "-version"])
            .output()
            .is_ok_and(|o| !o.status.success())
        {
            crate::stage::say(format_args!("{collector}: not in this Java"));
            continue;
        }
        let mut command = run.tortured("java")?;
        command.args([&option, "-Xms64m", "-Xmx256m", "-XX:-CreateCoredumpOnCrash", "Check"]);
        command.arg(each.as_millis().to_string());
        match run.finish(command, &format!("java-{collector}")) {
            Ok(text) if text.contains("checked true") => {}
            Ok(text) => failed.push(format!("{collector}: it printed {text}")),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
