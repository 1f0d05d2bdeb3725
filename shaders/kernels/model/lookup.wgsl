//# Variables: name, dtype (of the table), adds, workgroup_size.
//% import "lib/elements.wgsl" as elements_lib
//% import "lib/dense.wgsl" as dense_lib
// ${ name }: rows of a table by their numbers${ ", added to what is there: learned positions" if adds else ": the embedding of tokens" }.
//
//   numbers [rows]                     u32
//   table   [table_rows, width]        ${ dtype }, its rows first_row.. of a larger table
//   out     [rows, width]              f32: out[r] ${ "+=" if adds else "=" } table[numbers[r] + number_offset - first_row]
//
// A number whose row is not in this part of the table is another dispatch's; its row stays as it is. An invocation has
// an element.

struct Params {
    rows: u32,
    width: u32,
    numbers_offset: u32,
    number_offset: u32,
    first_row: u32,
    table_rows: u32,
    table_offset: u32,   // elements
    table_stride: u32,
    out_offset: u32,
    out_stride: u32,
    unused_0: u32,
    unused_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> numbers: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

//% if dtype != "f32"
${ elements_lib.widen(dtype) }
//% endif
${ dense_lib.load_element(dtype, "table") }

@compute @workgroup_size(${ workgroup_size })
fn lookup(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Workgroups continue along y where x has reached the device's limit.
    let index = (group.y * groups.x + group.x) * ${ workgroup_size }u + lane;
    let row = index / params.width;
    let column = index % params.width;
    if (row >= params.rows) {
        return;
    }
    let number = numbers[params.numbers_offset + row] + params.number_offset;
    if (number < params.first_row || number - params.first_row >= params.table_rows) {
        return;
    }
    let source = params.table_offset + (number - params.first_row) * params.table_stride + column;
    out[params.out_offset + row * params.out_stride + column] ${ "+=" if adds else "=" } load_element(source);
}
