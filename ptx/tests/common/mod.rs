//! Finds and runs `ptxas`, NVIDIA's assembler, for the tests and for `examples/assemble_all.rs`. It needs no GPU.

#![allow(dead_code, reason = "each user needs a part of this")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pagewise_ptx::{Kernel, receipt::fingerprint};

/// A GPU generation as the assembler names it, and the shared memory of a thread block there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arch {
    pub(crate) name: &'static str,
    sm: u32,
    shared: u32,
}

/// Ampere (A100, consumer), Ada, Hopper with its own instructions, consumer Blackwell.
pub(crate) const ARCHS: [Arch; 5] = [
    Arch { name: "sm_80", sm: 80, shared: 163 << 10 },
    Arch { name: "sm_86", sm: 86, shared: 99 << 10 },
    Arch { name: "sm_89", sm: 89, shared: 99 << 10 },
    Arch { name: "sm_90a", sm: 90, shared: 227 << 10 },
    Arch { name: "sm_120", sm: 120, shared: 99 << 10 },
];

impl Arch {
    /// Whether a kernel is for this GPU.
    pub(crate) fn runs(&self, kernel: &Kernel) -> bool {
        kernel.target().runs_on(self.sm)
    }
}

/// One assembly.
pub(crate) type Job<'a> = (&'a Kernel, Arch);

/// All pairs of a kernel and a GPU that it runs on. A variant that needs more shared memory than a GPU has is not for
/// that one: `a_variant_for_every_gpu` sees that another is.
pub(crate) fn all_jobs(kernels: &[Kernel]) -> Vec<Job<'_>> {
    let fits = |kernel: &Kernel, arch: &Arch| kernel.static_shared() + kernel.dynamic_shared() <= arch.shared;
    let archs = |kernel| ARCHS.into_iter().filter(move |arch: &Arch| arch.runs(kernel) && fits(kernel, arch));
    kernels.iter().flat_map(|kernel| archs(kernel).map(move |arch| (kernel, arch))).collect()
}

/// Assembles on all cores; the results come back in order.
pub(crate) fn assemble_jobs(ptxas: &Ptxas, jobs: &[Job<'_>]) -> Vec<Result<Resources, String>> {
    let results = Mutex::new(vec![None; jobs.len()]);
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((kernel, arch)) = jobs.get(index) else { break };
                    let result = ptxas.assemble(kernel, arch.name);
                    results.lock().unwrap()[index] = Some(result);
                }
            });
        }
    });
    results.into_inner().unwrap().into_iter().map(Option::unwrap).collect()
}

/// What is wrong with what an assembly gave: spills, or shared memory that the descriptor or the GPU do not know of.
pub(crate) fn faults((kernel, arch): Job<'_>, resources: Resources) -> Vec<String> {
    let Resources { shared, spills, .. } = resources;
    let (entry, name) = (kernel.entry(), arch.name);
    let mut faults = Vec::new();
    if spills > 0 {
        faults.push(format!("{entry} spills {spills} bytes on {name}"));
    }
    if shared != kernel.static_shared() {
        let declared = kernel.static_shared();
        faults.push(format!(
            "{entry} uses {shared} bytes of shared memory on {name}, its descriptor says {declared}"
        ));
    }
    let whole = shared + kernel.dynamic_shared();
    if whole > arch.shared {
        faults.push(format!(
            "{entry} takes {whole} bytes of shared memory, a thread block on {name} has {}",
            arch.shared
        ));
    }
    faults
}

/// A table with a line for each kernel: its shared memory, and its registers on each GPU that is in `jobs`.
pub(crate) fn table(jobs: &[Job<'_>], resources: &[Resources]) -> String {
    let mut table = String::from("kernel\tshared + dynamic");
    ARCHS.iter().for_each(|arch| table.extend(["\t", arch.name]));
    table.push('\n');
    let mut begin = 0;
    while let Some((kernel, _)) = jobs.get(begin) {
        let count = jobs[begin..].iter().take_while(|(next, _)| next.entry() == kernel.entry()).count();
        let mine = begin..begin + count;
        let registers = |arch: &Arch| {
            let at = mine.clone().find(|&at| jobs[at].1 == *arch);
            at.map_or("\t-".to_owned(), |at| format!("\t{}", resources[at].registers))
        };
        let shared = format!("{} + {}", kernel.static_shared(), kernel.dynamic_shared());
        let columns: String = ARCHS.iter().map(registers).collect();
        table.push_str(&format!("{}\t{shared}{columns}\n", kernel.entry()));
        begin += count;
    }
    table
}

/// What `ptxas -v` says of one kernel on one GPU generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) registers: u32,
    pub(crate) shared: u32,
    pub(crate) spills: u32,
}

/// The assembler, and the folder where results are kept by the fingerprint of what was assembled.
pub(crate) struct Ptxas {
    program: PathBuf,
    version: String,
    cache: PathBuf,
}

impl Ptxas {
    /// Looks at `$PTXAS`, then at what `scripts/install-ptxas` installs, then on the `PATH`. `None`,
    /// after a loud line, when there is none; with `CI=true` that fails the test instead.
    pub(crate) fn find() -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let candidates = std::env::var_os("PTXAS")
            .map(PathBuf::from)
            .into_iter()
            .chain([root.join(".tools/ptxas/nvidia/cu13/bin/ptxas"), PathBuf::from("ptxas")]);
        for program in candidates {
            if let Ok(output) = Command::new(&program).arg("--version").output()
                && output.status.success()
            {
                // Cargo names the folder for tests, not for examples.
                let kept = option_env!("CARGO_TARGET_TMPDIR").map_or(root.join("target/tmp"), PathBuf::from);
                let cache = kept.join("ptxas");
                std::fs::create_dir_all(&cache).unwrap();
                let version = String::from_utf8_lossy(&output.stdout).into_owned();
                return Some(Self { program, version, cache });
            }
        }
        let advice = "ptxas was found neither in $PTXAS, nor in .tools/ptxas, nor on the PATH; \
                      ./scripts/install-ptxas installs it (36 MB, no GPU needed)";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{advice}");
        // Past the test harness, which keeps eprintln! of a passing test to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {advice}");
        None
    }

    /// Assembles a kernel for `arch` (`"sm_90a"`), or finds the result of an earlier run.
    pub(crate) fn assemble(&self, kernel: &Kernel, arch: &str) -> Result<Resources, String> {
        let key = fingerprint(&format!("{}\n{arch}\n{}", self.version, kernel.text()));
        let kept = self.cache.join(format!("{key}.txt"));
        let log = match std::fs::read_to_string(&kept) {
            Ok(log) => log,
            Err(_) => {
                let log = self.run(kernel, arch, &key)?;
                // Renamed into place, so that a test run beside this one never reads half a log.
                let partial = self.cache.join(format!("{key}.{}.partial", std::process::id()));
                std::fs::write(&partial, &log).and_then(|()| std::fs::rename(&partial, &kept)).unwrap();
                log
            }
        };
        parse(&log).ok_or_else(|| format!("{} for {arch}: cannot read the log:\n{log}", kernel.entry()))
    }

    fn run(&self, kernel: &Kernel, arch: &str, key: &str) -> Result<String, String> {
        let source = self.cache.join(format!("{key}.{}.ptx", std::process::id()));
        std::fs::write(&source, kernel.text()).unwrap();
        let output = Command::new(&self.program)
            .args([
                "-v",
                "--warn-on-spills",
                "--warn-on-local-memory-usage",
                "-arch",
                arch,
                "-o",
                "/dev/null",
            ])
            .arg(&source)
            .output()
            .unwrap();
        std::fs::remove_file(&source).unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(log)
        } else {
            Err(format!("{} does not assemble for {arch}:\n{log}", kernel.entry()))
        }
    }
}

/// Reads the lines `… 0 bytes spill stores, 0 bytes spill loads` and `Used 32 registers, …, 512 bytes smem`.
fn parse(log: &str) -> Option<Resources> {
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line.split(what).next()?.split_whitespace().next_back()?.parse().ok()
    };
    let spill_line = log.lines().find(|line| line.contains("bytes spill stores"))?;
    let used_line = log.lines().find(|line| line.contains("Used ") && line.contains(" registers"))?;
    Some(Resources {
        registers: number_before(used_line, " registers")?,
        shared: if used_line.contains(" bytes smem") { number_before(used_line, " bytes smem")? } else { 0 },
        spills: number_before(spill_line, " bytes spill stores")?
            + number_before(spill_line, " bytes spill loads")?,
    })
}
