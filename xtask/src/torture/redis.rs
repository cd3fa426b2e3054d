//! redis: keys whose values are checked, while it saves and rewrites its log in forked children;
//! and checked again after it has read them back, without moves.

use super::run::{Run, Started};
use anyhow::{Context as _, bail, ensure};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

const KEYS: u64 = 20_000;
const SOCKET: &str = "redis.sock";

pub(crate) fn run(run: &Run) -> anyhow::Result<()> {
    let mut generations = vec![0u64; usize::try_from(KEYS)?];
    let mut server = run.start(server(run.tortured("redis-server")?), "redis-server")?;
    let mut client = Client::connect(&mut server)?;
    let (started, mut round) = (Instant::now(), 0);
    while round < 2 || started.elapsed() < run.share {
        round += 1;
        let stride = [1, 3, 7, 2][usize::try_from(round % 4)?];
        for key in (0..KEYS).step_by(stride) {
            generations[usize::try_from(key)?] = round;
            let value = value(key, round);
            client.ask(&[b"SET", format!("key:{key}").as_bytes(), &value])?;
            if key == KEYS / 2 / stride as u64 * stride as u64 {
                client.ask(&[if round % 2 == 0 { b"BGSAVE" } else { b"BGREWRITEAOF" }])?;
            }
        }
        client.check(&generations)?;
        server.check()?;
        settle(&mut client, &mut server)?;
    }
    let status = server.end(libc::SIGTERM)?;
    ensure!(status.success(), "redis-server: {status}");
    let mut server = run.start(self::server(run.command("redis-server")?), "redis-again")?;
    Client::connect(&mut server)?.check(&generations).context("read back from its log")?;
    let status = server.end(libc::SIGTERM)?;
    ensure!(status.success(), "redis-server: {status}");
    Ok(())
}

fn server(mut command: Command) -> Command {
    // Without its report of crashes it has no handler of SIGSEGV, which would take the engine's
    // place: live copies of memory that is unmapped meanwhile would end it.
    command.args(["--port", "0", "--unixsocket", SOCKET, "--save", "", "--appendonly", "yes"]);
    command.args(["--crash-log-enabled", "no", "--appendfsync", "no", "--activerehashing", "yes"]);
    command
}

/// Waits until the children have ended, and asks how.
fn settle(client: &mut Client, server: &mut Started<'_>) -> anyhow::Result<()> {
    server.until("save", |_| {
        let info = client.ask(&[b"INFO", b"persistence"])?;
        let info = String::from_utf8_lossy(&info).into_owned();
        let says = |what: &str| info.contains(what);
        ensure!(
            says("rdb_last_bgsave_status:ok")
                && says("aof_last_bgrewrite_status:ok")
                && says("aof_last_write_status:ok"),
            "redis could not save: {info}"
        );
        Ok(says("rdb_bgsave_in_progress:0")
            && says("aof_rewrite_in_progress:0")
            && says("aof_rewrite_scheduled:0"))
    })?;
    server.check()
}

/// What a key holds: up to 4 KiB that depend on both numbers.
fn value(key: u64, generation: u64) -> Vec<u8> {
    let mut state = (key << 20 | generation) + 1;
    let words = 1 + (key.wrapping_mul(31) + generation * 7) % 512;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..words).flat_map(word).collect()
}

/// Speaks RESP, version 2 (redis.io, "Redis serialization protocol specification").
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(server: &mut Started<'_>) -> anyhow::Result<Self> {
        let mut client = None;
        server.until("answer", |run| {
            let Ok(stream) = UnixStream::connect(run.folder.join(SOCKET)) else { return Ok(false) };
            stream.set_read_timeout(Some(Duration::from_secs(120)))?;
            let mut new = Self(BufReader::new(stream));
            let is_ready = new.ask(&[b"PING"]).is_ok();
            client = Some(new).filter(|_| is_ready);
            Ok(is_ready)
        })?;
        server.check()?;
        client.context("redis-server does not answer")
    }

    fn ask(&mut self, words: &[&[u8]]) -> anyhow::Result<Vec<u8>> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&request)?;
        let mut line = String::new();
        self.0.read_line(&mut line).context("redis-server gives no answer")?;
        let Some(kind) = line.chars().next() else { bail!("redis-server hung up") };
        let rest = line[1..].trim_end();
        match kind {
            '$' if rest != "-1" => {
                let mut value = vec![0; rest.parse::<usize>()? + 2];
                self.0.read_exact(&mut value)?;
                value.truncate(value.len() - 2);
                Ok(value)
            }
            '+' | ':' => Ok(rest.as_bytes().to_vec()),
            _ => bail!("redis-server says {}", line.trim_end()),
        }
    }

    fn check(&mut self, generations: &[u64]) -> anyhow::Result<()> {
        for (key, &generation) in (0u64..).zip(generations) {
            if generation > 0 {
                let found = self.ask(&[b"GET", format!("key:{key}").as_bytes()])?;
                ensure!(found == value(key, generation), "key:{key} has a wrong value");
            }
        }
        Ok(())
    }
}
