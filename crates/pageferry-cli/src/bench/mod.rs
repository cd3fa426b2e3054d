//! `pageferry bench`: how fast memory moves on this machine, what a program feels meanwhile, and
//! where this loses.
//!
//! # What must always hold
//! - Everything that is compared is measured in the same process and the same rounds, in turn
//!   ([`lab`]), and every word that was moved is read back ([`content`]). A wrong word is a
//!   failure of the whole run.
//! - A figure is a median with its spread. What could not be measured is absent, and why is said;
//!   a target that is missed is shown as missed.
//! - Options are checked against the machine before anything runs ([`plan`]).
//!
//! # What can go wrong
//! Neighbours on the same machine add noise: take the ratios, not the rates. A cancelled run
//! reports what it has, and says that it is not complete.

mod access;
mod alloc;
mod charts;
mod config;
mod content;
mod copying;
mod exchange;
mod feel;
mod figures;
mod html;
mod lab;
mod machine;
mod matrix;
mod memory;
mod moving;
mod plan;
mod probe;
mod schema;
mod slower;
mod stats;
mod svg;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use pageferry_copy::CopyEngine;

pub(crate) use self::plan::BenchArgs;

use self::lab::Lab;
use self::plan::{Plan, Scenario};
use self::schema::{Results, SCHEMA_VERSION, Settings};
use crate::cancel;
use crate::exit::Exit;
use crate::output::{Context, Problem};

pub(crate) fn run(args: BenchArgs, context: &Context) -> anyhow::Result<Exit> {
    if args.schema {
        context.print_json(&schema::json_schema())?;
        return Ok(Exit::Ok);
    }
    if args.kernel_matrix {
        return matrix::run(&args, context);
    }
    let plan = Plan::new(&args)?;
    // A stdout that is closed is an error now, not after minutes.
    context.print("")?;
    let lab = Lab::new(&plan, context)?;
    let mut results = measure(&lab)?;
    lab.end();
    figures::conclude(&mut results);

    if let Some(file) = &args.html {
        write(file, &html::render(&results)?)?;
    }
    match &args.json {
        Some(file) if file.as_os_str() == "-" => context.print_json(&results)?,
        Some(file) => {
            write(file, &(serde_json::to_string_pretty(&results)? + "\n"))?;
            context.print(text::render(&results)?)?;
        }
        None => context.print(text::render(&results)?)?,
    }
    Ok(match (results.failures.is_empty(), results.complete) {
        (false, _) => Exit::Failed,
        (true, false) => Exit::Cancelled,
        (true, true) => Exit::Ok,
    })
}

fn measure(lab: &Lab<'_>) -> anyhow::Result<Results> {
    let began = Instant::now();
    let plan = lab.plan;
    let mut results = Results {
        schema_version: SCHEMA_VERSION,
        pageferry_version: env!("CARGO_PKG_VERSION").to_owned(),
        complete: false,
        machine: machine::describe(&lab.engine),
        settings: Settings {
            mode: plan.mode.name().to_owned(),
            scenarios: plan.scenarios.iter().map(|scenario| scenario.name()).collect(),
            region_bytes: plan.region as u64,
            rounds: plan.rounds,
            seconds: plan.feel.as_secs_f64(),
            seed: lab.content.seed,
            clock_overhead_ns: stats::clock_overhead_ns(),
            default_engine: lab.engine.cpu().name().to_owned(),
            elapsed_s: 0.0,
        },
        runs: Vec::new(),
        ratios: BTreeMap::new(),
        targets: Vec::new(),
        losses: Vec::new(),
        skipped: Vec::new(),
        failures: Vec::new(),
    };
    let mut complete = true;
    for &scenario in &plan.scenarios {
        if cancel::requested() {
            complete = false;
            break;
        }
        let done = match scenario {
            // The moves measure it too, in the same rounds.
            Scenario::Roofline if plan.scenarios.contains(&Scenario::Moves) => Ok(true),
            Scenario::Roofline => copying::run_roofline(lab, &mut results),
            Scenario::Copy => copying::run(lab, &mut results),
            Scenario::Moves => moving::run(lab, &mut results),
            Scenario::FirstFolio => moving::run_first_folio(lab, &mut results),
            Scenario::Feel => feel::run(lab, &mut results),
            Scenario::NeverSlower => slower::run(lab, &mut results),
            Scenario::Memory => memory::run(lab, &mut results),
        };
        match done {
            Ok(done) => complete &= done,
            // What other scenarios found is not thrown away with this one.
            Err(error) => results.failures.push(format!("{}: {error:#}", scenario.name())),
        }
    }
    results.complete = complete;
    results.settings.elapsed_s = began.elapsed().as_secs_f64();
    Ok(results)
}

fn write(file: &Path, content: &str) -> anyhow::Result<()> {
    fs::write(file, content).map_err(|error| {
        let problem = Problem {
            what: format!("cannot write {}", file.display()),
            because: error.to_string(),
            remedy: "name a file that you may write to, on a file system with room".to_owned(),
            exit: Exit::Failed,
        };
        problem.into()
    })
}
