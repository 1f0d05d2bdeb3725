//! Files the receipts of a GPU run under `ptx/receipts/`, one file for each kernel family.
//!
//! ```text
//! cargo run -p pagewise-ptx --example import_receipts -- receipts.json …
//! ```
//!
//! A receipt is refused when the kernel has changed since that run. Without arguments, it only gives
//! each new variant its empty receipt and takes away those of variants that no longer exist.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use pagewise_ptx::all_kernels;
use pagewise_ptx::receipt::{Receipt, Standing};

fn read(path: &Path) -> Result<Vec<Receipt>, Box<dyn Error>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", path.display()))?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("receipts");
    std::fs::create_dir_all(&folder)?;
    let kernels = all_kernels()?;

    let mut runs = BTreeMap::new();
    for path in std::env::args_os().skip(1) {
        for receipt in read(Path::new(&path))? {
            let kernel = kernels
                .iter()
                .find(|kernel| kernel.entry() == receipt.variant)
                .ok_or_else(|| format!("there is no kernel {}", receipt.variant))?;
            if receipt.standing(kernel) != Standing::Checked {
                return Err(format!("{} is not the kernel that ran: run it again", receipt.variant).into());
            }
            runs.insert(receipt.variant.clone(), receipt);
        }
    }

    let mut filed: BTreeMap<&str, Vec<Receipt>> = BTreeMap::new();
    for kernel in &kernels {
        let receipts = filed.entry(kernel.family()).or_default();
        let path = folder.join(format!("{}.json", kernel.family()));
        let known = if path.exists() { read(&path)? } else { Vec::new() };
        let receipt = runs
            .remove(kernel.entry())
            .or_else(|| known.into_iter().find(|receipt| receipt.variant == kernel.entry()))
            .unwrap_or(Receipt { variant: kernel.entry().to_string(), run: None });
        receipts.push(receipt);
    }
    for (family, receipts) in filed {
        let path = folder.join(format!("{family}.json"));
        std::fs::write(&path, serde_json::to_string_pretty(&receipts)? + "\n")?;
        let pending = receipts.iter().filter(|receipt| receipt.run.is_none()).count();
        println!("{}: {} receipts, {pending} pending", path.display(), receipts.len());
    }
    Ok(())
}
