"""Parts of ``chameleon bench serve``: what to send, sending it on time, and what came back."""
