"""What every family stands on: the table of ops, schemas, dispatch, checks, layouts, structs of arguments."""
