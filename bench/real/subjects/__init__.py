"""What is asked of a real model, one file a subject: SUBJECT, and ORDER among the others."""
