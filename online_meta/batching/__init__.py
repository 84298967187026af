"""Sum meta-gradients over tasks: in a loop, under vmap, traced or compiled; benchmark the modes and choose one."""
