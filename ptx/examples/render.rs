//! Prints the rendered text of a kernel variant, or the list of all variants.
//!
//! ```text
//! cargo run -p pagewise-ptx --example render                           # the list
//! cargo run -p pagewise-ptx --example render -- write_kv_bf16_bf16_v8  # one text
//! ```

use std::process::ExitCode;

fn main() -> ExitCode {
    let kernels = match pagewise_ptx::all_kernels() {
        Ok(kernels) => kernels,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let Some(wanted) = std::env::args().nth(1) else {
        for kernel in &kernels {
            println!("{}", kernel.description());
        }
        return ExitCode::SUCCESS;
    };
    match kernels.iter().find(|kernel| kernel.entry() == wanted) {
        Some(kernel) => {
            print!("{}", kernel.text());
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("there is no variant {wanted}; run this without an argument for the list");
            ExitCode::FAILURE
        }
    }
}
