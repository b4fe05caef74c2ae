; A 512-byte guest that writes to every disk the BIOS knows, for ever, through INT 13h.
;
; One sector a disk, then it sleeps until the next timer tick (18.2 Hz): an idle guest costs the host
; nothing, and an I/O error still comes within a tick. The block moves on by 4 KiB each round and
; wraps at 16 MiB, so that a thinly provisioned disk keeps growing until its pool is full.
; SeaBIOS polls virtio disks and hangs after a *reported* virtio error: use it with policies that pause.
bits 16
org 0x7c00
start:
  xor ax, ax
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov sp, 0x7c00
  sti
round:
  mov dl, 0x80
disk:
  mov si, packet
  mov ax, 0x4300          ; extended write, no verify
  push dx
  int 0x13
  pop dx
  inc dl
  mov al, dl
  sub al, 0x80
  cmp al, [0x475]         ; BIOS data area: how many hard disks there are
  jb disk
  add word [lba], 8
  and word [lba], 0x7fff
  jnz tick
  mov word [lba], 8       ; never the boot sector
tick:
  hlt
  jmp round
align 4
packet: db 0x10, 0
        dw 1
        dw 0x8000, 0
lba:    dq 8
times 510-($-$$) db 0
dw 0xaa55
