"""Sum meta-gradients over tasks: task by task, stacked, traced or compiled; measure, choose and check."""
