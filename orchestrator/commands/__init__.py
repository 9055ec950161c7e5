"""Pure: values in, command lines and text out, and the parser of that command's output beside it. No I/O."""
