"""From text to a launch: render a template, build the text, load the binary; what launches compute on the host."""
